"""The backbone in other hands: ONNX, torch.compile, torch.export, FLOP counts, safetensors."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import setformer_ext.onnx
from setformer_ext import SetAttention
from setformer_ext.vision import Setformer

SMALL = {
    "dims": (32, 32, 64, 64),
    "depths": (1, 1, 1, 1),
    "num_references": (4, 4, 4, 4),
    "num_classes": 7,
}
OPTIONS = {
    "the backbone's": {"iterations": 1, "adaptive_reference_mass": True},
    "many steps, positions": {"iterations": 7, "position_bandwidth": 0.5},
    "no steps": {"iterations": 0},
    "own query, learned scales": {
        "query_projection": True,
        "learned_epsilon": True,
        "learned_bandwidth": True,
    },
    "pooled references": {"pooled_references": True},
    "linear": {"kernel": "linear"},
}


def make(**options: object) -> Setformer:
    torch.manual_seed(0)
    return timm.create_model("setformer_mini", **{**SMALL, **options}).eval()


def run_onnx(path: Path, *inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [node.name for node in session.get_inputs()]
    (output,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(output)


def assert_as_good_as_torch(output: Tensor, model: nn.Module, *inputs: Tensor) -> None:
    """As close to the model in float64 as its float32 is, up to a factor, in the largest entry."""
    with torch.no_grad():
        low = model(*inputs)
        exact = model.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    model.float()
    scale = exact.abs().max() * torch.finfo(torch.float32).eps
    error, allowed = (output - exact).abs().max(), 4 * (low - exact).abs().max() + 4 * scale
    assert error <= allowed, f"{error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_in_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SetAttention(24, 3, 6, **OPTIONS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = (torch.randn(2, 11, 24), torch.rand(2, 11) > 0.3)
    if model.pooled_references:  # ONNX has no stable sort, which a mask would need
        inputs = inputs[:1]
    path = tmp_path / "attention.onnx"
    setformer_ext.onnx.export(model, inputs, path)
    assert_as_good_as_torch(run_onnx(path, *inputs), model, *inputs)


def test_backbone_in_onnx_at_any_size(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "backbone.onnx"
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    setformer_ext.onnx.export(model, (torch.randn(2, 3, 96, 64),), path, dynamic_shapes=shapes)
    for shape in [(2, 3, 96, 64), (1, 3, 131, 77)]:
        batch = torch.randn(shape)
        assert_as_good_as_torch(run_onnx(path, batch), model, batch)


def test_compiles_to_one_graph_forward_and_backward() -> None:
    model, batch = make().train(), torch.randn(2, 3, 64, 64)

    def gradients(function: nn.Module) -> list[Tensor]:
        model.zero_grad()
        function(batch).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch))
    torch.testing.assert_close(gradients(compiled), expected)


def test_exports() -> None:
    model, batch = make(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (batch,))
    torch.testing.assert_close(program.module()(batch), model(batch))


def test_bfloat16_autocast() -> None:
    model, batch = make(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    torch.testing.assert_close(output.float(), model(batch), atol=0.03, rtol=0.03)


def test_torch_counts_the_flops() -> None:
    """Two a multiply-add, of convolutions, linear layers and attention."""
    dim, hidden, references, classes = 32, 96, 4, 7
    model = make(dims=(dim,) * 4, num_classes=classes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 64, 64))
    stem = 32**2 * (dim // 2) * 3 * 9 + 16**2 * dim * (dim // 2) * 9
    total = stem + dim * classes
    for stage, side in enumerate((16, 8, 4, 2)):
        tokens = side**2
        total += tokens * dim * dim * 9 if stage else 0
        total += tokens * dim * 9  # the depthwise convolution
        linear = dim * (3 * dim + 1 + 2 * hidden)  # key, value, projection, token mass; MLP
        total += tokens * linear + dim * references  # and the references' mass
        total += 4 * tokens * references * dim  # similarity twice, collect, distribute
    counted = counter.get_total_flops() / 2
    assert math.isclose(counted, total, rel_tol=0.02), (counted, total)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = timm.create_model("setformer_mini", **SMALL).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    batch = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(batch), model(batch))
