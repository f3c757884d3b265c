"""Peak memory of large problems: no N x M array, forward or backward."""

import pytest

from fresh import fresh

MIB = 2**20

# Reports, in bytes, by how much the peak of the resident set exceeds what it was before the
# inputs were made. D = Dv = 16, float32, T = 5, two threads.
MEASURE = """
import re
import resource
import torch, setformer_ext

torch.set_num_threads(2)
N, M = {N}, {M}
reference = torch.randn(1, M, 16, requires_grad=True)

def attend(tokens, backward):
    key, value, upstream = (torch.randn(1, 1, tokens, 16) for _ in range(3))
    key.requires_grad_(backward)
    value.requires_grad_(backward)
    output = setformer_ext.set_attention(
        None, key, value, reference if backward else reference.detach(), normalize=False
    )
    if backward:
        output.backward(upstream)

# what first calls allocate once and for all: threads, kernels' code, torch's own tables
attend(1000, True)
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
attend(N, {backward})
# not ru_maxrss: a process inherits that from the one that started it
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
result = int(peak[1]) * 1024 - resident
"""


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("N", "M"), [(1_000_000, 64), (20_000, 8_000)])
def test_peak_memory(N: int, M: int, backward: bool) -> None:
    token_array, reference_array = 4 * 16 * N, 4 * 16 * M
    # inputs, output and its gradient; in backward the gradients of key and value as well
    arrays = (6 if backward else 4) * token_array
    # references, pooled outputs, and what they are cast, packed and summed into
    work = 16 * reference_array
    # normalisers of T = 5 steps and of T = 0, and in backward as many numbers for the adjoint
    work += 4 * (5 + 1) * (N + M) * (3 if backward else 1)
    # for each of two threads some tiles of a hundred tokens by all references
    work += 2 * 4 * 4 * 100 * M
    # code, buffers of the allocator
    work += 32 * MIB
    assert work < 4 * N * M, "the bound would not notice an N x M array"
    peak = fresh(MEASURE.format(N=N, M=M, backward=backward))
    assert peak > arrays - token_array, "the measurement misses the inputs"
    assert peak < arrays + work, f"{peak / MIB:.0f} MiB > {(arrays + work) / MIB:.0f} MiB"
