"""Which runs a table needs, and running those that are not on record."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from .mixers import set_options
from .network import make_network
from .records import Plan, Run, append, load
from .tasks import TASKS
from .training import train

LEARNING_RATES = (1e-3, 2.5e-3, 6e-3)
SEEDS = (0, 1, 2)


def of_mixer(runs: Iterable[Run], task: str, mixer: str) -> list[Run]:
    """Those on record of a mixer as it is now: the task's steps, SetAttention's options."""
    options = set_options(mixer, TASKS[task].references, {})
    return [
        run
        for run in runs
        if (run.plan.task, run.plan.mixer, run.plan.options, run.plan.study, run.steps)
        == (task, mixer, options, False, TASKS[task].steps)
    ]


def chosen(runs: Iterable[Run], task: str, mixer: str) -> list[Run]:
    """The mixer's runs at the learning rate whose first seed validates best, if all were tried."""
    made = of_mixer(runs, task, mixer)
    first = {run.plan.learning_rate: run for run in made if run.plan.seed == SEEDS[0]}
    if not set(LEARNING_RATES) <= set(first):
        return []
    best = max(LEARNING_RATES, key=lambda rate: first[rate].validation)
    return [run for run in made if run.plan.learning_rate == best]


def missing(runs: Iterable[Run], task: str, mixer: str) -> list[Plan]:
    """What is to be run next for a mixer: all learning rates with the first seed, and then the
    other seeds at the best."""
    runs = list(runs)
    options = set_options(mixer, TASKS[task].references, {})
    best = chosen(runs, task, mixer)
    if best:
        rate = best[0].plan.learning_rate
        wanted = [Plan(task, mixer, rate, seed, options) for seed in SEEDS]
    else:
        wanted = [Plan(task, mixer, rate, SEEDS[0], options) for rate in LEARNING_RATES]
    made = [run.plan for run in of_mixer(runs, task, mixer)]
    return [plan for plan in wanted if plan not in made]


def run_missing(task: str, mixers: Iterable[str], folder: Path, jobs: int) -> Iterator[Run]:
    """Run what the task's table lacks, several at a time, each on one core and put on record as it
    ends."""

    def wanted() -> list[Plan]:
        runs = load()
        return [plan for mixer in mixers for plan in missing(runs, task, mixer)]

    yield from _run(wanted, folder, jobs)


def run_all(plans: Iterable[Plan], folder: Path, jobs: int) -> Iterator[Run]:
    """Run these plans, those on record aside."""
    plans = list(plans)
    for plan in plans:  # a network that cannot be built is found before hours of work
        make_network(TASKS[plan.task], plan.mixer, plan.options)

    def wanted() -> list[Plan]:
        made = [run.plan for run in load() if run.steps == TASKS[run.plan.task].steps]
        return [plan for plan in plans if plan not in made]

    yield from _run(wanted, folder, jobs)


def _run(wanted: Callable[[], list[Plan]], folder: Path, jobs: int) -> Iterator[Run]:
    """Run what is wanted, which is asked anew as runs end, until nothing is."""
    context = multiprocessing.get_context("spawn")
    # A process for each run, so that its memory is the run's own.
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        running: dict[Future[Run], Plan] = {}
        while True:
            waiting = [plan for plan in wanted() if plan not in running.values()]
            for plan in waiting[: jobs - len(running)]:
                running[pool.submit(train, plan, folder)] = plan
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                append(future.result())
                yield future.result()
