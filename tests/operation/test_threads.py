"""The same bits every time, for any number of threads, and no more threads than torch was told."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import Backend
from emulator.device import Emulator
from fresh import fresh
from setformer_ext.cli.selftest.problems import Arguments, output_gradient, random_problem, run

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# More heads than threads; one head that threads must share; cross attention; in the log domain.
PROBLEMS = {
    "many heads": {"B": 3, "H": 5, "N": 97, "M": 17},
    "one long head": {"B": 1, "H": 1, "N": 20011, "M": 33, "reference_mass": "learned"},
    "three long heads": {"B": 1, "H": 3, "N": 4099, "M": 7, "masked": True, "token_mass": True},
    "cross": {"B": 1, "H": 2, "N": 3001, "Nq": 1025, "M": 9, "masked": True, "P": 2},
    "linear": {"B": 1, "H": 2, "N": 5003, "M": 31, "kernel": "linear", "epsilon": 0.01},
    "many references": {"B": 1, "H": 1, "N": 257, "M": 2049, "D": 5, "per_sample": True},
}


def results(backend: Backend, arguments: Arguments) -> dict[str, torch.Tensor]:
    grad_output = output_gradient(backend.set_attention, arguments)
    together = run(backend.set_attention, arguments, grad_output)
    pooled = run(backend.set_pooling, arguments, output_gradient(backend.set_pooling, arguments))
    return together | {f"pooling {name}": x for name, x in pooled.items()}


# For one fiber at a time: too deep to be resident, more tokens than one block takes.
SHORT = {
    "many heads": {"B": 2, "H": 2},
    "one long head": {"N": 401, "D": 72},
    "three long heads": {"N": 301, "D": 72},
    "cross": {"N": 301, "Nq": 205},
    "linear": {"N": 401},
    "many references": {"M": 129},
}


def ways_to_run(backend: Backend) -> Iterator[str]:
    """Sets in turn what must not change a bit, and names it."""
    if backend.emulated:
        device = Emulator(str(backend.module.__file__))
        for order in ("reverse", "random"):  # without it they run forward
            with device.configured(order):  # with the same seed, by which approximations err
                yield f"threads and blocks in {order} order"
    elif backend.on_cuda:
        yield from ("a second run", "a third run")
    else:
        for threads in (1, 2, 2, 4):
            torch.set_num_threads(threads)
            yield f"{threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", PROBLEMS)
def test_bitwise_the_same(backend: Backend, options: str, dtype: torch.dtype) -> None:
    """Forward and backward, from run to run, for any number of threads, in any order of them."""
    sizes = PROBLEMS[options]
    if backend.emulated:
        if dtype in (torch.float64, torch.float16) and options != "cross":
            pytest.skip("one problem will do of what is float32's and bfloat16's code, emulated")
        sizes = sizes | SHORT[options] | {"iterations": 2}  # a step after the first
    arguments = random_problem(1, dtype=dtype, device=backend.device, **sizes)
    torch.set_num_threads(1)
    expected = results(backend, arguments)
    for way in ways_to_run(backend):
        for name, x in results(backend, arguments).items():
            assert torch.equal(x, expected[name]), f"{name} with {way}"


def test_calls_from_several_python_threads(backend: Backend) -> None:
    """They run at the same time (kernels release the GIL) and do not disturb one another."""
    sizes = {"N": 65, "H": 2, "iterations": 2} if backend.emulated else {"N": 1025}
    problems = [random_problem(seed, **sizes, device=backend.device) for seed in range(4)]
    torch.set_num_threads(2)
    expected = [results(backend, arguments) for arguments in problems]
    with ThreadPoolExecutor(8) as pool:
        calls = [*range(4)] * (2 if backend.emulated else 4)
        found = pool.map(lambda i: results(backend, problems[i]), calls)
        for i, result in zip(calls, found, strict=True):
            for name, x in result.items():
                assert torch.equal(x, expected[i][name]), name


COUNT = """
import os, re
import torch, setformer_ext
from setformer_ext.cli.selftest.problems import output_gradient, random_problem, run

def count():
    return len(os.listdir("/proc/self/task"))

def call():
    arguments = random_problem(0, N=20011, B=2, dtype=torch.float32)
    function = setformer_ext.set_attention
    run(function, arguments, output_gradient(function, arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_set_num_threads_is_obeyed(threads: int) -> None:
    """The process has as many threads more as it takes beside the calling one."""
    code = f"""
torch.set_num_threads({threads})
before = count()
call()
result = count() - before
"""
    assert fresh(COUNT + code) == threads - 1


@pytest.mark.slow
def test_a_forked_child_computes_on_one_thread() -> None:
    """OpenMP's threads do not come along, which OpenMP does not know: it would wait for them, as
    torch's own operations then do."""
    code = """
import os, signal
torch.set_num_threads(2)
arguments = random_problem(0, N=20011, B=2, dtype=torch.float32)
expected = setformer_ext.set_attention(**arguments).numpy()
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = setformer_ext.set_attention(**arguments).numpy()
    os._exit(0 if (found == expected).all() else 1)
result = os.waitpid(child, 0)[1]
"""
    assert fresh(COUNT + code) == 0


@pytest.mark.slow
def test_workers_of_a_data_loader() -> None:
    code = """
class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        arguments = random_problem(index, N=2000, dtype=torch.float32)
        return setformer_ext.set_attention(**arguments)

torch.set_num_threads(2)
expected = [Samples()[i] for i in range(6)]
loader = torch.utils.data.DataLoader(Samples(), batch_size=None, num_workers=2, timeout=60)
result = all(torch.equal(x, y) for x, y in zip(loader, expected, strict=True))
"""
    assert fresh(COUNT + code)


@pytest.mark.slow
def test_one_pool_of_threads_with_torch() -> None:
    """After torch has started its threads a call needs none of its own."""
    code = """
torch.set_num_threads(3)
idle = count()
torch.ones(1 << 22).exp().sum()
before = count()
call()
maps = open("/proc/self/maps").read()
libraries = sorted(set(re.findall(r"/\\S*lib[gi]?omp\\S*", maps)))
result = [before - idle, count() - before, libraries]
"""
    of_torch, more, libraries = fresh(COUNT + code)
    assert of_torch == 2
    assert more == 0
    assert len(libraries) == 1, libraries


@pytest.mark.slow
def test_set_num_threads_holds_in_every_thread() -> None:
    """OpenMP keeps the number per calling thread; torch's setting must reach all of them."""
    started = fresh(
        """
        import os, threading, torch, setformer_ext
        torch.set_num_threads(1)
        x, y = torch.randn(2, 4, 300, 8), torch.randn(4, 5, 8)
        threads = []

        def work():
            setformer_ext.set_attention(None, x, x, y)
            threads.append(len(os.listdir("/proc/self/task")))

        before = len(os.listdir("/proc/self/task"))
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        result = threads[0] - before
        """
    )
    assert started == 1  # the worker itself
