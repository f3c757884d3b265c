"""What SetAttention is compared with."""

import pytest
import torch

from setformer_ext.controls import ATTENTIONS, MeanAttention, SoftmaxAttention, make_attention


def test_every_token_gets_the_mean_of_the_valid_ones() -> None:
    attention = MeanAttention(6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    output = attention(x, mask)
    expected = attention.projection(x[0, :3].mean(0))
    torch.testing.assert_close(output[0, :3], expected.expand(3, 6))
    assert (output[0, 3:] == 0).all()
    assert (output[1] == 0).all()
    torch.testing.assert_close(attention(x[:1, :3]), output[:1, :3])


@pytest.mark.parametrize("kind", ATTENTIONS[:-1])
def test_what_padding_holds_does_not_matter(kind: str) -> None:
    attention = make_attention(kind, 8, 2, 4, {})
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    spoiled = torch.where(mask.unsqueeze(-1), x, torch.inf)
    spoiled.requires_grad_()
    output = attention(spoiled, mask)
    torch.testing.assert_close(output, attention(x, mask))
    output.sum().backward()
    assert (spoiled.grad[~mask] == 0).all()


def test_a_block_may_be_without_attention() -> None:
    assert make_attention("none", 8, 2, 4, {}) is None
    assert isinstance(make_attention("softmax", 8, 2, 4, {}), SoftmaxAttention)
