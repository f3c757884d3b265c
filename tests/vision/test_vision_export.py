"""The backbone in other hands: ONNX, torch.compile, torch.export, FLOP counts, safetensors."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import setformer_ext.onnx
from setformer_ext import SetAttention, set_pooling
from setformer_ext.cli.selftest.problems import generator, random_mask
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
    "own query, positions": {"query_projection": True, "position_bandwidth": 0.5},
    "pooled references, positions": {"pooled_references": True, "position_bandwidth": 0.5},
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


def attention(**options: object) -> SetAttention:
    torch.manual_seed(0)
    model = SetAttention(24, 3, 6, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_in_onnx(name: str, tmp_path: Path) -> None:
    model, path = attention(**OPTIONS[name]), tmp_path / "attention.onnx"
    inputs = (torch.randn(2, 11, 24), random_mask(generator(0), 2, 11))
    setformer_ext.onnx.export(model, inputs, path)
    assert_as_good_as_torch(run_onnx(path, *inputs), model, *inputs)


@pytest.mark.slow
def test_attention_in_onnx_at_any_length(tmp_path: Path) -> None:
    model, path = attention(**OPTIONS["pooled references, positions"]), tmp_path / "attention.onnx"
    inputs = (torch.randn(2, 11, 24), random_mask(generator(0), 2, 11))
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2
    setformer_ext.onnx.export(model, inputs, path, dynamic_shapes=shapes)
    for batch, length in [(3, 17), (1, 4)]:
        inputs = (torch.randn(batch, length, 24), random_mask(generator(0), batch, length))
        assert_as_good_as_torch(run_onnx(path, *inputs), model, *inputs)


@pytest.mark.slow
def test_attention_in_onnx_accumulates_in_float32(tmp_path: Path) -> None:
    """A half-precision model: off by no more than the kernels, to the last place of the result."""
    model, path = attention(epsilon=0.02).half(), tmp_path / "attention.onnx"
    x = torch.randn(2, 11, 24).half()
    setformer_ext.onnx.export(model, (x,), path)
    with torch.no_grad():
        low, exact = model(x), model.double()(x.double())
    allowed = (low - exact).abs().max() + exact.abs().max() * torch.finfo(torch.float16).eps
    assert (run_onnx(path, x) - exact).abs().max() <= allowed


class Plan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(position_bandwidth=0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [B, N, C], [B, N] -> [B, H, N, M]
        return self.attention.transport_plan(x, mask)


class Pooling(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [B, N, C], [B, N] -> [B, 1, M, C]
        x = x.unsqueeze(1)
        return set_pooling(x, x, x[0, :, :3], mask=mask, kernel="linear", epsilon=5.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Plan, Pooling])
def test_other_operations_in_onnx(kind: type[nn.Module], tmp_path: Path) -> None:
    model, path = kind(), tmp_path / "operation.onnx"
    inputs = (torch.randn(2, 11, 24), random_mask(generator(0), 2, 11))
    setformer_ext.onnx.export(model, inputs, path)
    assert_as_good_as_torch(run_onnx(path, *inputs), model, *inputs)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_needs_its_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"{package} is not installed: pip install"):
        setformer_ext.onnx.export(attention(), (torch.randn(2, 11, 24),))


@pytest.mark.slow
def test_backbone_in_onnx_at_any_size(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "backbone.onnx"
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    setformer_ext.onnx.export(model, (torch.randn(2, 3, 96, 64),), path, dynamic_shapes=shapes)
    for shape in [(2, 3, 96, 64), (1, 3, 131, 77)]:
        batch = torch.randn(shape)
        assert_as_good_as_torch(run_onnx(path, batch), model, batch)


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiles_once_for_all_sizes() -> None:
    """Nothing in the model, not even a check's message, may fix a size."""
    model, counter = make(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for shape in [(2, 3, 64, 96), (3, 3, 133, 97), (4, 3, 70, 224)]:
        batch = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch), model(batch))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_exports_for_all_sizes() -> None:
    model = make()
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 64),), dynamic_shapes=(sizes,))
    for shape in [(2, 3, 96, 64), (1, 3, 131, 77)]:
        batch = torch.randn(shape)
        torch.testing.assert_close(program.module()(batch), model(batch))


def test_bfloat16_autocast() -> None:
    """Forward, backward and the classifier: off by a few of bfloat16's places of 2^-8."""
    model, batch = make().train(), torch.randn(2, 3, 64, 64)
    expected = model.forward_features(batch)  # normed: of size 1
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_features(batch)
        output = model(batch)
    assert output.dtype == torch.bfloat16
    error = (features - expected).square().mean().sqrt()
    assert 0 < error < 5 * 2**-8, error
    output.float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_torch_counts_the_flops() -> None:
    """Two a multiply-add, of convolutions, linear layers and attention, counted by hand."""
    dim, hidden, references, classes = 32, 96, 4, 7
    model = make(dims=(dim,) * 4, num_classes=classes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 64, 64))
    stem = 32**2 * (dim // 2) * 3 * 9 + 16**2 * dim * (dim // 2) * 9
    total = stem + dim * classes
    for stage, side in enumerate((16, 8, 4, 2)):
        tokens = side**2
        total += tokens * dim * dim * 9 if stage else 0
        total += tokens * hidden * 9  # the depthwise convolution
        linear = dim * (3 * dim + 1 + 2 * hidden)  # key, value, projection, token mass; MLP
        total += tokens * linear + dim * references  # and the references' mass
        # Similarity, collect and distribute; two multiply-adds for the one Sinkhorn step, and one
        # for the normaliser of distribute.
        total += tokens * references * (3 * dim + 2 + 1)
    assert counter.get_total_flops() == 2 * total


def test_safetensors_round_trip(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = timm.create_model("setformer_mini", **SMALL).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    batch = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(batch), model(batch))


@pytest.mark.slow
def test_compiles_with_gradient_checkpointing() -> None:
    """One graph, and the batch counts once in the running statistics."""
    torch._dynamo.reset()
    batch, results = torch.randn(2, 3, 64, 64), []
    for compiled in (False, True):
        model = make().train()
        model.set_grad_checkpointing()
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        function(batch).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(results[1], results[0])
