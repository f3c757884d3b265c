"""What scaling to unit length promises of lengths, in any type."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from setformer_ext.cli.selftest.problems import Arguments, output_gradient, run

SCALED = ("query", "key", "reference")


def what_depends_on_lengths(function: Callable[..., Tensor], arguments: Arguments) -> Iterator[str]:
    """What follows from O(c x) = O(x), and does not hold.

    Gradients are at right angles to what is scaled: to the rounding of gradients and of scaled
    vectors, half a unit of the type each, of sums of which directions may cancel a part. And powers
    of 2 as factors change nothing but the gradients, and those exactly.
    """
    upstream = output_gradient(function, arguments)
    results = run(function, arguments, upstream)
    names = [name for name in SCALED if arguments[name] is not None]
    for name in names:
        gradient, x = results[name].double(), arguments[name].detach().double()
        most = gradient.norm(dim=-1).max() * x.norm(dim=-1).max()
        along = (gradient * x.nan_to_num()).sum(-1).abs().max()
        if along > 8 * torch.finfo(arguments[name].dtype).eps * most:
            yield f"{name}: {along / most:.2g} of the gradient is along what is scaled"
    powers = {
        name: 2.0 ** (torch.arange(arguments[name].shape[-2]) % 3).to(arguments[name])[:, None]
        for name in names
    }
    longer = {name: arguments[name].detach() * power for name, power in powers.items()}
    for name, result in run(function, arguments | longer, upstream).items():
        expected = results[name] / powers[name] if name in powers else results[name]
        limits = torch.finfo(result.dtype)
        difference = (result - expected).abs().max()
        if not difference <= limits.smallest_normal * limits.eps:  # the step of subnormal numbers
            yield f"{name}: differs by {difference:.2g} for longer vectors"
