"""Groups of ranks to test with: threads of this process, or processes with gloo."""

import io
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from setformer_ext.distributed.ranks import log2_sum
from setformer_ext.problem import OF_KEYS, OF_QUERIES

Result = TypeVar("Result")

# A clean server that has the modules, so that a process starts at once.
processes = get_context("forkserver")
processes.set_forkserver_preload(["setformer_ext.distributed", "torch._dynamo"])

PATIENCE = 120  # seconds that no exchange may take


class ThreadRanks:
    """Merges what the threads of this process share, for the kernels alone."""

    def __init__(self, count: int):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=PATIENCE)
        self.shared: list[list[Tensor]] = [[]] * count

    def merge(self, rank: int) -> Callable[[list[Any], str], None]:
        def merge(arrays: list[Any], how: str) -> None:
            own = [from_dlpack(array) for array in arrays]
            self.shared[rank] = own
            self.barrier.wait()
            parts = [torch.stack(columns) for columns in zip(*self.shared, strict=True)]
            self.barrier.wait()
            for array, part in zip(own, parts, strict=True):
                array.copy_(part.sum(0) if how == "sum" else log2_sum(part))

        return merge

    def run(self, call: Callable[[int, Callable[..., None]], Result]) -> list[Result]:
        """call(rank, merge) in a thread for each rank."""
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(call, rank, self.merge(rank)) for rank in range(self.count)]
            return [future.result(PATIENCE) for future in futures]


def run_on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(*arguments) in processes of one gloo group; what each returns or raises."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            own, theirs = processes.Pipe()
            process = processes.Process(
                target=_run, args=(theirs, f"{folder}/store", rank, count, function, arguments)
            )
            process.start()
            theirs.close()
            started.append((process, own))
        return [_result(process, own) for process, own in started]


def values(results: Sequence[Any]) -> list[Any]:
    """The results, none of which is an error."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return list(results)


def _result(process: Any, own: Connection) -> Any:
    try:
        if not own.poll(PATIENCE):
            return TimeoutError("the rank hangs")
        # As bytes: tensors would be shared with a process that may have ended.
        return torch.load(io.BytesIO(own.recv()), weights_only=False)
    except EOFError:
        return ConnectionAbortedError("the rank died")
    finally:
        process.join(5)
        process.kill()


def _run(
    pipe: Connection,
    store: str,
    rank: int,
    count: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=PATIENCE / 2),
        )
        result = function(*arguments)
    except BaseException as error:  # pytest's own are no Exceptions
        traceback.print_exc()
        result = error if isinstance(error, Exception) else AssertionError(repr(error))
    finally:
        buffer = io.BytesIO()
        torch.save(result, buffer)
        pipe.send(buffer.getvalue())
        if dist.is_initialized():
            dist.destroy_process_group()


# In float64: sums of a few hundred numbers of up to a thousand, in another order.
CLOSE = {"rtol": 0, "atol": 1e-11}


def shard(
    problem: dict[str, Any], lengths: tuple[int, ...], rank: int, queries: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The rank's part of a problem, whose tensors then are leaves."""
    own = {name: x for name, x in problem.items() if isinstance(x, Tensor)}
    for dimensions, sizes in ((OF_KEYS, lengths), (OF_QUERIES, queries)):
        for name, dimension in dimensions.items():
            if name in own:
                own[name] = own[name].narrow(dimension, sum(sizes[:rank]), sizes[rank])
    return problem | {
        name: x.detach().clone().requires_grad_(x.is_floating_point() and "positions" not in name)
        for name, x in own.items()
    }


def loss_of(output: Tensor) -> Tensor:
    return output.square().sum()


def gradients(problem: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: x.grad for name, x in problem.items() if isinstance(x, Tensor) and x.grad is not None
    }
