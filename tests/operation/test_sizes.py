"""Problems beyond every size at which the kernels change how they compute: the scores that the CPU
keeps, the spans that threads share a head by, and the tiles of tokens, references and depth."""

from typing import Any

import pytest
import torch

from conftest import Backend
from exactness import assert_as_exact_as_definition
from setformer_ext import set_attention
from setformer_ext.cli.selftest.problems import Arguments, output_gradient, random_problem, run

ONE_HEAD = {"B": 1, "H": 1, "D": 5, "Dv": 3}
LOGARITHMS = {"epsilon": 0.01}  # below 1/32 float32 takes logarithms instead of scaling

# The CPU keeps 16 MiB of scores a head, in backward for two matrices, and 128 MiB of all heads.
KEPT: dict[str, dict[str, Any]] = {
    "beyond": ONE_HEAD | {"N": 66_001, "M": 64, "iterations": 2},
    "beyond in backward": ONE_HEAD | {"N": 33_001, "M": 64, "iterations": 2},
    "beyond of all heads": {
        "B": 1,
        "H": 17,
        "N": 8_003,
        "M": 64,
        "D": 2,
        "Dv": 2,
        "iterations": 1,
        "dtype": torch.float64,
    },
}
# The emulated kernels' tiles are of 64 tokens, 64 references and 32 channels.
MASKED = {"masked": True, "iterations": 2}
TILES: dict[str, dict[str, Any]] = {
    "more references than a tile, positions": MASKED | {"N": 75, "M": 70, "P": 2, "Nq": 41},
    "the same, streaming": MASKED | {"B": 1, "H": 1, "N": 130, "M": 70, "D": 136, "P": 2},
    "many more queries than tokens": MASKED | {"B": 1, "H": 1, "N": 3, "Nq": 301, "M": 9},
    "many more tokens than queries": MASKED | {"B": 1, "H": 1, "N": 301, "Nq": 2, "M": 9},
}


def of(backend: Backend, **options: Any) -> Arguments:
    return random_problem(**({"dtype": torch.float32} | options), device=backend.device)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_scores_beyond_those_that_are_kept(name: str) -> None:
    arguments = random_problem(**({"dtype": torch.float32} | KEPT[name]))
    assert_as_exact_as_definition(set_attention, arguments)


@pytest.mark.parametrize("name", TILES)
def test_beyond_the_tiles(backend: Backend, name: str) -> None:
    sizes = {"B": 1, "H": 2, "D": 24, "Dv": 9} | TILES[name]
    if not backend.emulated:  # which are as fast with ten times as many
        sizes |= {n: 10 * sizes[n] + 1 for n in ("N", "Nq") if sizes.get(n, 0) > 40}
    assert_as_exact_as_definition(backend.set_attention, of(backend, **sizes))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("epsilon", [0.01, 0.1], ids=["logarithms", "scaling"])
def test_spans_that_begin_with_nothing(backend: Backend, epsilon: float, cross: bool) -> None:
    """Threads and blocks share a head by spans of its tokens; the first of them are masked whole,
    so that their sums are of nothing: -inf in the log domain."""
    N, begin = (403, 280) if backend.emulated else (6001, 4100)
    options = {"B": 1, "H": 1, "N": N, "M": 9, "D": 24, "Dv": 5, "iterations": 2}
    if cross:
        options["Nq"] = N // 2
    arguments = of(backend, **options, masked=True, epsilon=epsilon)
    arguments["mask"][:, :begin] = False
    if cross:
        arguments["query_mask"][:, : begin // 2] = False
    assert arguments["mask"].any()
    assert_as_exact_as_definition(backend.set_attention, arguments)


def test_what_is_kept_changes_no_number() -> None:
    """The same head alone, whose scores are kept, and among so many that none are."""
    options = {"B": 1, "N": 8_003, "M": 64, "D": 2, "Dv": 2, "iterations": 2}
    arguments = random_problem(H=17, **options)
    found = run(set_attention, arguments, output_gradient(set_attention, arguments))
    upstream = output_gradient(set_attention, arguments)
    alone = {
        name: x[:, 3:4] if name in ("key", "value") else x[3:4] if name == "reference" else x
        for name, x in arguments.items()
    }
    expected = run(set_attention, alone, upstream[:, 3:4])
    torch.testing.assert_close(found["output"][:, 3:4], expected["output"])
    for name in ("key", "value"):
        torch.testing.assert_close(found[name][:, 3:4], expected[name])
    torch.testing.assert_close(found["reference"][3:4], expected["reference"])
