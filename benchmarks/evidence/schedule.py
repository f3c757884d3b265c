"""Which runs a table needs, and running those that are not on record."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import Any

from .mixers import options_of
from .network import make_network
from .records import Plan, Run, append, held, load
from .tasks import TASKS
from .training import train

LEARNING_RATES = (1e-3, 2.5e-3, 6e-3)
STUDY_RATE = 2.5e-3  # of all that is compared with one another in a study
SEEDS = (0, 1, 2)


def plan(
    task: str,
    mixer: str,
    learning_rate: float,
    seed: int,
    changed: dict[str, Any] | None = None,
    study: bool = False,
) -> Plan:
    """A run of the task and the mixer as they are now, but for changed options."""
    options = options_of(mixer, TASKS[task].references, changed or {})
    return Plan(task, TASKS[task].recipe, mixer, learning_rate, seed, options, study)


def chosen(runs: Iterable[Run], task: str, mixer: str) -> list[Run]:
    """The mixer's runs on record, one a seed, at the learning rate that validates best on average
    over the seeds it has; none before all rates were tried."""
    made: dict[float, dict[int, Run]] = {rate: {} for rate in LEARNING_RATES}
    for run in runs:
        rate = run.plan.learning_rate
        if rate in made and run.plan == plan(task, mixer, rate, run.plan.seed):
            made[rate][run.plan.seed] = run
    if not all(SEEDS[0] in of_rate for of_rate in made.values()):
        return []
    best = max(made.values(), key=lambda of_rate: fmean(r.validation for r in of_rate.values()))
    return [best[seed] for seed in SEEDS if seed in best]


def missing(runs: Iterable[Run], task: str, mixer: str) -> list[Plan]:
    """What is to be run next for a mixer: all learning rates with the first seed, then the other
    seeds at the best. A rate that was best by luck may no longer be so then, and the next is."""
    runs = list(runs)
    best = chosen(runs, task, mixer)
    if best:
        wanted = [plan(task, mixer, best[0].plan.learning_rate, seed) for seed in SEEDS]
    else:
        wanted = [plan(task, mixer, rate, SEEDS[0]) for rate in LEARNING_RATES]
    made = [run.plan for run in runs]
    return [each for each in wanted if each not in made]


def run_missing(task: str, mixers: Iterable[str], folder: Path, jobs: int) -> Iterator[Run]:
    """Run what the task's table lacks, several at a time, each on one core and put on record as it
    ends."""
    mixers = tuple(mixers)

    def wanted() -> list[Plan]:
        runs = load()
        return [each for mixer in mixers for each in missing(runs, task, mixer)]

    yield from _run(wanted, folder, jobs)


def run_all(plans: Iterable[Plan], folder: Path, jobs: int) -> Iterator[Run]:
    """Run these plans, those on record aside."""
    plans = list(plans)
    for each in plans:  # a network that cannot be built is found before hours of work
        make_network(TASKS[each.task], each.mixer, each.options)

    def wanted() -> list[Plan]:
        made = [run.plan for run in load()]
        return [each for each in plans if each not in made]

    yield from _run(wanted, folder, jobs)


def _run(wanted: Callable[[], list[Plan]], folder: Path, jobs: int) -> Iterator[Run]:
    """Run what is wanted, which is asked anew as runs end, until nothing is. After an error those
    that are running end and are put on record."""
    context = multiprocessing.get_context("spawn")
    error: BaseException | None = None
    running: dict[Future[Run], Plan] = {}
    # A process for each run, so that its memory is the run's own.
    with held(), ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        while True:
            for each in wanted():
                if error is None and len(running) < jobs and each not in running.values():
                    running[pool.submit(train, each, folder)] = each
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                error = error or future.exception()
                if future.exception() is None:
                    append(future.result())
                    yield future.result()
    if error is not None:
        raise error
