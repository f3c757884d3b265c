"""SetAttention as users of other attention modules expect it: context, dropout, device, dtype."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from setformer_ext import SetAttention
from setformer_ext import reference as definition


def make(**options: object) -> SetAttention:
    torch.manual_seed(0)
    module = SetAttention(24, 3, 7, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONTEXTS = {
    "default": {},
    "queries are keys": {"query_projection": False},
    "another width": {"context_dim": 10},
    "everything": {
        "context_dim": 10,
        "pooled_references": True,
        "adaptive_reference_mass": True,
        "num_anchors": 5,
        "position_bandwidth": 0.5,
    },
}


def test_context_is_the_definition_on_its_own_projections() -> None:
    """Keys, values and masses of the context, queries of x; masks of both."""
    module, x, context = (
        make(context_dim=10),
        tokens(2, 5, 24),
        tokens(2, 9, 10),
    )
    mask, context_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:] = context_mask[1, 4:] = False

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (3, 8)).transpose(1, 2)

    output = definition.set_attention(
        heads(module.query(x)),
        heads(module.key(context)),
        heads(module.value(context)),
        module.reference,
        mask=context_mask,
        query_mask=mask,
        token_mass=module.token_mass(context).exp().transpose(1, 2),
        reference_mass=module.reference_log_mass.exp(),
    )
    expected = module.projection(output.transpose(1, 2).flatten(2)).where(mask.unsqueeze(-1), 0)
    torch.testing.assert_close(
        module(x, mask, context=context, context_mask=context_mask), expected
    )


@pytest.mark.parametrize("name", CONTEXTS)
def test_padding_of_either_side_changes_nothing(name: str) -> None:
    module, x = make(**CONTEXTS[name]), tokens(2, 6, 24)
    context = tokens(2, 8, module.context_dim)
    mask, context_mask = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    mask[:, 4:] = context_mask[:, 6:] = False
    if module.position_bandwidth is not None:  # padding counts as part of the sequence
        expected = module(x, mask, context=context, context_mask=context_mask)
    else:
        expected = torch.zeros_like(x)
        expected[:, :4] = module(x[:, :4], context=context[:, :6])
    holed = [
        y.masked_fill(~m.unsqueeze(-1), math.nan).requires_grad_()
        for y, m in ((x, mask), (context, context_mask))
    ]
    output = module(holed[0], mask, context=holed[1], context_mask=context_mask)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for y, m in zip(holed, (mask, context_mask), strict=True):
        assert (y.grad[~m] == 0).all()
        assert y.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_a_context_of_the_tokens_themselves_is_attention_to_themselves() -> None:
    """Where masses are uniform: those of queries always are."""
    options = {"learned_token_mass": False, "learned_reference_mass": False}
    module, x = make(position_bandwidth=0.5, **options), tokens(2, 12, 24)
    output = module(x, grid=(3, 4), context=x, context_grid=(3, 4))
    torch.testing.assert_close(output, module(x, grid=(3, 4)))


def test_the_plan_of_a_context() -> None:
    module, context = make(context_dim=10), tokens(2, 9, 10)
    plan = module.transport_plan(context)
    torch.testing.assert_close(plan.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))


def test_context_errors_name_the_argument() -> None:
    module, x, context = make(), tokens(2, 6, 24), tokens(2, 8, 24)
    mask = torch.ones(2, 8, dtype=torch.bool)
    for options, error, message in (
        ({"context_mask": mask}, ValueError, "context_mask must be None without a context"),
        ({"context": context[:1]}, ValueError, r"context must be \[B=2, Nc, Cc\] as x is"),
        ({"context": context[..., :3]}, ValueError, r"context must be floating point \[B, N, C=24"),
        ({"context": [1.0]}, TypeError, "context must be a tensor, got list"),
        (
            {"context": context, "context_mask": mask[:, :4]},
            ValueError,
            "context_mask must be bool",
        ),
        ({"context": context, "context_grid": (3, 3)}, ValueError, "context_grid must be"),
        ({"mask": mask, "context": context}, ValueError, r"mask must be bool \[B=2, N=6\]"),
    ):
        with pytest.raises(error, match=message):
            module(x, **options)
    with pytest.raises(ValueError, match="context must be given to a module of context_dim=10"):
        make(context_dim=10)(x)
    with pytest.raises(ValueError, match="context_dim must be dim=24 or None without query_proj"):
        make(query_projection=False, context_dim=10)
    nested = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged)
    with pytest.raises(ValueError, match="context must be None with a nested x"):
        module(nested, context=context)


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_what_is_masked() -> None:
    module, x = make(dropout=0.25), tokens(1, 6, 24)
    mask = torch.arange(6).unsqueeze(0) < 4
    expected = module.eval()(x, mask)
    torch.testing.assert_close(expected, copy.deepcopy(module)(x, mask))
    module.train()
    draws = torch.stack([module(x, mask) for _ in range(4000)])
    dropped = (draws[:, mask] == 0).double().mean()
    # A share of 4000 x 96 draws: its deviation is (.25 * .75 / 384,000)^(1/2).
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / draws[:, mask].numel())
    # Of each number: |y| (p / (1 - p) / 4000)^(1/2).
    deviation = expected.abs() * math.sqrt(1 / 3 / 4000)
    assert ((draws.mean(0) - expected).abs() <= 5 * deviation).all()
    assert (draws[:, ~mask] == 0).all()


def test_dropout_of_nested_tensors() -> None:
    module = make(dropout=0.5)
    nested = torch.nested.nested_tensor([tokens(5, 24), tokens(3, 24)], layout=torch.jagged)
    share = (module(nested).values() == 0).double().mean()
    assert 0.2 < share < 0.8
    assert (module.eval()(nested).values() != 0).all()


def test_device_and_dtype_of_all_parameters() -> None:
    options = {"num_anchors": 5}
    module = SetAttention(24, 3, device="meta", dtype=torch.bfloat16, **options)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    x = torch.empty(2, 9, 24, device="meta", dtype=torch.bfloat16)
    assert module(x).shape == (2, 9, 24)  # Nystrom features among it
    again = SetAttention(24, 3, dtype=torch.bfloat16, **options)
    for made in (module.to_empty(device="cpu"), again):
        torch.manual_seed(1)
        made.reset_parameters()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name)), name


def test_numbers_of_numpy_are_numbers() -> None:
    module = SetAttention(
        np.int64(24),
        np.int32(3),
        np.uint8(7),
        iterations=np.int64(2),
        epsilon=np.float32(0.25),
        bandwidth=np.float64(1),
        num_anchors=np.int16(4),
        position_bandwidth=np.float16(0.5),
    )
    plain = SetAttention(
        24, 3, 7, iterations=2, epsilon=0.25, num_anchors=4, position_bandwidth=0.5
    )
    plain.load_state_dict(module.state_dict())
    x = tokens(2, 12, 24).float()
    grid = (np.int64(3), np.int64(4))
    assert torch.equal(module(x, grid=grid), plain(x, grid=(3, 4)))
    assert repr(module) == repr(plain)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("attn_mask", "give mask, bool"),
        ("key_padding_mask", "give mask=~key_padding_mask"),
        ("is_causal", "no causal form"),
        ("need_weights", "transport_plan"),
    ],
)
def test_names_of_other_attentions_are_answered(name: str, advice: str) -> None:
    with pytest.raises(TypeError, match=f"SetAttention: has no argument {name}: .*{advice}"):
        make()(tokens(2, 6, 24), **{name: None})
    with pytest.raises(TypeError, match=f"SetAttention: has no argument {name}: .*{advice}"):
        make().transport_plan(tokens(2, 6, 24), **{name: None})
    with pytest.raises(TypeError, match="unexpected keyword argument 'msak'"):
        make()(tokens(2, 6, 24), msak=None)


def test_masks_of_numbers_are_answered_with_what_to_do() -> None:
    x = tokens(2, 6, 24)
    with pytest.raises(TypeError, match=r"mask must be bool .*\.bool\(\).*== 0"):
        make()(x, torch.zeros(2, 6))
    with pytest.raises(TypeError, match="context="):
        make()(x, x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("adaptive", [False, True])
def test_reference_masses_that_underflow(adaptive: bool, dtype: torch.dtype) -> None:
    """A softmax rounds to 0, which the operation would refuse."""
    module = SetAttention(24, 3, 7, adaptive_reference_mass=adaptive, dtype=dtype)
    with torch.no_grad():
        module.reference_log_mass[:, 0] = 2000
    x = tokens(2, 6, 24).to(dtype)
    output = module(x)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_a_decoder_layer_of_it_trains() -> None:
    """Self attention, then attention to a context: the sum of losses falls."""
    torch.manual_seed(0)
    own, other = (
        SetAttention(16, 2, 8),
        SetAttention(16, 2, 8, context_dim=6),
    )
    x, context, target = torch.randn(4, 5, 16), torch.randn(4, 9, 6), torch.randn(4, 5, 16)
    optimizer = torch.optim.Adam([*own.parameters(), *other.parameters()], 1e-2)
    losses = []
    for _ in range(30):
        y = x + own(x)
        loss = nn.functional.mse_loss(y + other(y, context=context), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
