"""benchmarks/evidence: that mixers compute what they are named after, at equal cost, and that the
record and the table are read as the docs say."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from evidence import records, schedule, table
from evidence.mixers import MIXERS, FeatureAttention, Performer, make_mixer, set_options
from evidence.network import make_network
from evidence.records import Plan, Run
from evidence.schedule import LEARNING_RATES, SEEDS, chosen, missing
from evidence.tasks import TASKS, listops, recall
from evidence.tasks.task import IGNORED, Data, Samples, Task
from evidence.training import train

WITHOUT_PACKAGES = [name for name in TASKS if name not in ("overlap", "senses")]


@pytest.mark.parametrize("task", WITHOUT_PACKAGES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_all_networks_of_a_task_have_the_same_parameters(task: str, mixer: str) -> None:
    def count(mixer: str) -> int:
        options = set_options(mixer, TASKS[task].references, {})
        network = make_network(TASKS[task], mixer, options)
        return sum(parameter.numel() for parameter in network.parameters())

    assert abs(count(mixer) / count("softmax") - 1) < 0.02


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "none"])
def test_what_padding_holds_reaches_no_valid_token(mixer: str) -> None:
    module = make_mixer(mixer, 32, 2, set_options(mixer, 4, {}))
    x = torch.randn(2, 7, 32)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    other = torch.where(mask.unsqueeze(-1), x, torch.randn_like(x))
    torch.testing.assert_close(module(other, mask)[mask], module(x, mask)[mask])
    torch.testing.assert_close(module(x[1:, :4]), module(x, mask)[1:, :4])


def test_linear_attention_is_attention_with_products_of_features() -> None:
    module = FeatureAttention(12, 3).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    query, key, value = (
        part.unflatten(-1, (3, 4)).transpose(1, 2)
        for part in module.query_key_value(x).chunk(3, dim=-1)
    )
    weights = (F.elu(query) + 1) @ (F.elu(key) + 1).mT  # [B, H, N, N]
    output = weights / weights.sum(-1, keepdim=True) @ value
    expected = module.projection(output.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected)


def test_performer_is_softmax_attention_on_average_over_directions() -> None:
    torch.manual_seed(0)
    module = Performer(16, 2).double()
    # Directions of a deviation of 1 in number: the error of a mean falls as their root.
    module.directions = torch.randn(2, 200_000, 8, dtype=torch.float64)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    parts = module.query_key_value(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    output = F.scaled_dot_product_attention(*parts)
    expected = module.projection(output.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, atol=0.02, rtol=0)


def run(plan: Plan, validation: float = 0.5, test: float = 0.5) -> Run:
    return Run(plan, TASKS[plan.task].steps, 1000, 1.0, validation, test, 10.0, 20.0)


def test_the_learning_rate_is_chosen_by_validation_and_then_seeds_are_run() -> None:
    plans = missing([], "patches", "softmax")
    assert [(plan.learning_rate, plan.seed) for plan in plans] == [
        (rate, SEEDS[0]) for rate in LEARNING_RATES
    ]
    # The test would choose the first, validation the second.
    runs = [
        run(plan, validation, test)
        for plan, validation, test in zip(plans, (0.6, 0.7, 0.5), (0.9, 0.1, 0.2), strict=True)
    ]
    assert missing(runs[:2], "patches", "softmax") == plans[2:]
    assert chosen(runs[:2], "patches", "softmax") == []
    more = missing(runs, "patches", "softmax")
    best = LEARNING_RATES[1]
    assert [(plan.learning_rate, plan.seed) for plan in more] == [(best, s) for s in SEEDS[1:]]
    runs += [run(plan, 0.8, 0.3) for plan in more]
    assert missing(runs, "patches", "softmax") == []
    cell = table.cells(runs, "patches")["softmax"]
    assert cell.mean == pytest.approx((0.1 + 0.3 + 0.3) / 3)


def test_runs_of_other_options_steps_or_studies_are_not_taken_for_the_mixers() -> None:
    plan = missing([], "patches", "SeT")[0]
    others = [
        run(replace(plan, study=True)),
        run(replace(plan, options=plan.options | {"iterations": 7})),
        replace(run(plan), steps=1),
    ]
    assert plan in missing(others, "patches", "SeT")
    assert plan not in missing([*others, run(plan)], "patches", "SeT")


def test_an_option_that_set_attention_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="SetAttention has no option epsilom"):
        set_options("SeT", 16, {"epsilom": 0.1})


def test_a_task_tells_something_if_softmax_is_clear_of_none() -> None:
    def cell(mean: float, spread: float) -> table.Cell:
        return table.Cell(mean, spread, 1.0, 1.0, 1, 1e-3)

    none = cell(0.5, 0.03)
    assert table.tells({"none": none}) is None
    assert table.tells({"none": none, "softmax": cell(0.66, 0.04)}) is True  # 0.16 > 3 * 0.05
    assert table.tells({"none": none, "softmax": cell(0.64, 0.04)}) is False


def test_a_run_comes_back_from_the_record(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert records.load(file) == []
    runs = [run(plan) for plan in missing([], "points", "SeT")]
    runs.append(replace(runs[0], test=None, plan=replace(runs[0].plan, study=True)))
    for each in runs:
        records.append(each, file)
    assert records.load(file) == runs


def test_the_record_in_the_repository_can_be_read() -> None:
    for each in records.load():
        assert each.plan.task in TASKS
        assert each.plan.mixer in MIXERS
        assert 0 <= each.validation <= 1
        assert (each.test is None) == each.plan.study


def test_the_value_of_an_expression() -> None:
    # [MAX 2 9 [MIN 4 7] 0] = 9, [SM 9 8 7] = 24 mod 10, [MED 1 5 8 9] = 6.5, cut
    names = list(listops.OPERATORS)
    smallest = (names.index("MIN"), [4, 7])
    tree = (names.index("MAX"), [2, 9, smallest, 0])
    assert listops.value(smallest) == 4
    assert listops.value(tree) == 9
    assert listops.value((names.index("SM"), [9, 8, 7])) == 4
    assert listops.value((names.index("MED"), [1, 5, 8, 9])) == 6
    written = listops.write(tree)
    assert len(written) == 5 + 2 * 2  # digits, and where two expressions begin and end
    assert written[0] == 11 + names.index("MAX")
    assert written[-1] == listops.END


def test_recall_asks_for_the_value_behind_each_key() -> None:
    pairs = 16
    sequences, labels, _ = recall.load(pairs, Path()).validation
    told = sequences[:, : 2 * pairs].unflatten(1, (pairs, 2))
    for sequence, asked, answers in zip(told[:50], sequences[:50], labels[:50], strict=True):
        values = dict(sequence.tolist())
        assert len(values) == pairs
        assert (answers[: 2 * pairs] == IGNORED).all()
        expected = [values[key] - recall.KEYS for key in asked[2 * pairs :].tolist()]
        assert answers[2 * pairs :].tolist() == expected


def _are_there_two_alike(count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(count, 12, generator=generator).topk(4)[1]
    alike = torch.rand(count, generator=generator) < 0.5
    tokens[alike, 3] = tokens[alike, 0]
    return Samples(tokens, alike.long())


def _tiny(load: object) -> Task:
    return Task(
        "tiny", "two alike", load, lambda dim: nn.Embedding(12, dim), 2, 500, 32,
        dim=32, depth=2, num_heads=2, references=4,
    )  # fmt: skip


def test_a_training_learns_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Data(*(_are_there_two_alike(count, count) for count in (2000, 201, 202)))
    monkeypatch.setitem(TASKS, "tiny", _tiny(lambda _folder: parts))
    threads = torch.get_num_threads()
    try:
        runs = {
            (mixer, study): train(
                Plan("tiny", mixer, 6e-3, 0, set_options(mixer, 4, {}), study), Path()
            )
            for mixer in ("none", "softmax", "SeT")
            for study in (False, True)
        }
    finally:
        torch.set_num_threads(threads)
    assert runs["none", False].validation < 0.75  # single tokens tell nothing, their mean little
    for mixer in ("softmax", "SeT"):
        made, again = runs[mixer, False], runs[mixer, True]
        assert made.validation > 0.85
        assert made.test > 0.85
        assert again.test is None
        assert (made.loss, made.validation) == (again.loss, again.validation)
        assert made.milliseconds > 0
        assert made.mebibytes > 0


def test_schedule_runs_what_is_missing_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.jsonl"
    monkeypatch.setattr(schedule, "load", lambda: records.load(file))
    monkeypatch.setattr(schedule, "append", lambda made: records.append(made, file))
    monkeypatch.setattr(schedule, "train", _not_trained)
    made = list(schedule.run_missing("patches", ["none"], tmp_path, jobs=2))
    plans = [each.plan for each in made]
    assert len(plans) == len(LEARNING_RATES) + len(SEEDS) - 1
    assert all(plans.count(plan) == 1 for plan in plans)
    assert list(schedule.run_missing("patches", ["none"], tmp_path, jobs=2)) == []


def _not_trained(plan: Plan, folder: Path) -> Run:
    return run(plan, validation=plan.learning_rate)
