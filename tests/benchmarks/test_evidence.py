"""benchmarks/evidence: that mixers compute what they are named after, at equal cost, and that the
record and the table are read as the docs say."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from evidence import costs, records, schedule, table
from evidence.__main__ import _read
from evidence.mixers import MIXERS, FeatureAttention, Performer, make_mixer, options_of
from evidence.network import make_network
from evidence.picture import draw
from evidence.records import Plan, Run
from evidence.schedule import LEARNING_RATES, SEEDS, STUDY_RATE, chosen, missing, plan
from evidence.studies import studies
from evidence.tasks import TASKS, garments, images, listops, recall, senses
from evidence.tasks.task import IGNORED, Data, Samples, Task
from evidence.training import accuracy, make_optimizer, train

WITHOUT_PACKAGES = [name for name in TASKS if name not in ("overlap", "senses")]


@pytest.mark.parametrize("task", WITHOUT_PACKAGES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_all_networks_of_a_task_have_the_same_parameters(task: str, mixer: str) -> None:
    def count(mixer: str) -> int:
        options = options_of(mixer, TASKS[task].references, {})
        network = make_network(TASKS[task], mixer, options)
        return sum(parameter.numel() for parameter in network.parameters())

    assert abs(count(mixer) / count("softmax") - 1) < 0.02


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "none"])
def test_what_padding_holds_reaches_no_valid_token(mixer: str) -> None:
    module = make_mixer(mixer, 32, 2, options_of(mixer, 4, {}))
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


def test_performers_features_have_the_products_of_softmax_attention_on_average() -> None:
    """The mean over directions of exp(w q - q^2 / 2) exp(w k - k^2 / 2) is exp(<q, k>)."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, 2, 5, 8) / 2).unsqueeze(1)  # [1, 2, 5, 8] each
    means = []
    for _ in range(300):
        module = Performer(16, 2)
        exponents = module._exponents(query), module._exponents(key)
        assert exponents[0].shape == (1, 2, 5, 4 * 8)
        means.append((exponents[0] + exponents[1]).exp().mean(-1))
    found = torch.stack(means)  # [300, 1, 2, 5]
    expected = ((query * key).sum(-1) / 8**0.5).exp()
    deviation = found.std(0) / len(means) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * deviation).all()


def test_performer_is_attention_with_products_of_its_features() -> None:
    module = Performer(16, 2).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    parts = module.query_key_value(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = parts
    weights = module._exponents(query).exp() @ module._exponents(key).exp().mT  # [1, 2, 6, 6]
    output = weights / weights.sum(-1, keepdim=True) @ value
    expected = module.projection(output.transpose(1, 2).flatten(2))
    # What keeps features above 0 adds 1e-6 of the largest to each.
    torch.testing.assert_close(module(x), expected, atol=1e-2, rtol=0)


def run(plan: Plan, validation: float = 0.5, test: float | None = 0.5) -> Run:
    return Run(plan, TASKS[plan.task].steps, 1000, 1.0, validation, test, 10.0, 20.0)


def all_runs(task: str, mixer: str, mean: float) -> list[Run]:
    """With a spread of 0.01 in the tests."""
    runs = [run(each, each.learning_rate, 0.0) for each in missing([], task, mixer)]
    best = LEARNING_RATES[-1]
    return runs[:-1] + [run(plan(task, mixer, best, s), best, mean + 0.01 * (s - 1)) for s in SEEDS]


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
    runs += [run(runs[1].plan, 0.7, 0.9)]  # a run that was made twice counts once
    assert missing(runs, "patches", "softmax") == []
    cell = table.cells(runs, "patches")["softmax"]
    assert cell.mean == pytest.approx((0.9 + 0.3 + 0.3) / 3)


def test_a_rate_that_was_best_by_luck_is_left_for_the_next() -> None:
    runs = [
        run(each, validation)
        for each, validation in zip(missing([], "patches", "softmax"), (0.6, 0.7, 0.8), strict=True)
    ]
    last, second = LEARNING_RATES[2], LEARNING_RATES[1]
    runs.append(run(plan("patches", "softmax", last, SEEDS[1]), 0.5))  # on average 0.65
    more = missing(runs, "patches", "softmax")
    assert [(each.learning_rate, each.seed) for each in more] == [(second, s) for s in SEEDS[1:]]
    runs += [run(each, 0.69) for each in more]
    assert missing(runs, "patches", "softmax") == []
    assert {each.plan.learning_rate for each in chosen(runs, "patches", "softmax")} == {second}


def test_runs_of_other_options_steps_or_studies_are_not_taken_for_the_mixers() -> None:
    first = missing([], "patches", "SeT")[0]
    others = [
        run(replace(first, study=True)),
        run(replace(first, options=first.options | {"iterations": 7})),
        run(replace(first, recipe="1.1: an earlier one")),
    ]
    assert first in missing(others, "patches", "SeT")
    assert first not in missing([*others, run(first)], "patches", "SeT")


def test_an_option_that_set_attention_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="SetAttention has no option epsilom"):
        options_of("SeT", 16, {"epsilom": 0.1})


def test_a_task_tells_something_if_softmax_is_clear_of_none() -> None:
    def cell(mean: float, spread: float) -> table.Cell:
        return table.Cell(mean, spread, 1, 1e-3)

    none = cell(0.5, 0.03)
    assert table.tells({"none": none}) is None
    assert table.tells({"none": none, "softmax": cell(0.66, 0.04)}) is True  # 0.16 > 3 * 0.05
    assert table.tells({"none": none, "softmax": cell(0.64, 0.04)}) is False


def test_equals_are_level_95_times_of_100() -> None:
    generator = torch.Generator().manual_seed(0)
    accuracies = torch.randn(20000, 2, 3, generator=generator, dtype=torch.float64)
    level = 0
    for pair in accuracies[:2000]:
        one, other = (table.Cell(each.mean().item(), each.std().item(), 1, 1e-3) for each in pair)
        level += table.verdict(one, other) == "level"
    assert 0.93 < level / 2000 < 0.97
    assert table.verdict(table.Cell(0.9, 0.01, 1, 1.0), table.Cell(0.8, 0.01, 1, 1.0)) == "ahead"
    assert table.verdict(table.Cell(0.8, 0.01, 1, 1.0), table.Cell(0.9, 0.01, 1, 1.0)) == "behind"


def test_tables_and_picture_are_of_the_tasks_that_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "load", lambda task: {"softmax": costs.Cost(12.0, 34.0)})
    runs = all_runs("points", "none", 0.5) + all_runs("points", "softmax", 0.7)
    runs += all_runs("patches", "none", 0.7) + all_runs("patches", "softmax", 0.7)
    runs += all_runs("points", "SeT", 0.8)
    lines = table.summary(runs, TASKS).splitlines()
    assert len(lines) == 3
    assert "| points | 0.500 ± 0.010 |  | 0.700 ± 0.010 |" in lines[2]
    text = table.details(runs, "points", costs.load("points"))
    assert "| none | 0.5000 ± 0.0100 | behind | ahead |  |  | 1,000 | 0.006 |" in text
    assert "| softmax | 0.7000 ± 0.0100 |  | ahead | 12 | 34 | 1,000 | 0.006 |" in text
    assert "| SeT | 0.8000 ± 0.0100 | ahead |  |" in text
    assert "tells nothing" in table.details(runs, "patches", {})
    draw(runs, tmp_path / "evidence.png")
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


def test_a_study_counts_each_seed_once_at_one_rate() -> None:
    runs = [run(plan("points", "SeT", STUDY_RATE, 0), 0.7)]
    runs += [run(plan("points", "SeT", STUDY_RATE, seed, {}, True), 0.7, None) for seed in (0, 1)]
    runs += [run(plan("points", "SeT", 1e-3, 2), 0.9)]
    changed = {"epsilon": 0.5, "kernel": "linear"}
    runs += [run(plan("points", "SeT", STUDY_RATE, 0, changed, True), 0.6, None)]
    assert studies(runs).splitlines()[2:] == [
        "| as they are by default | 0.700 ± 0.000 |",
        "| kernel=linear, epsilon=0.5 | 0.600 |",
    ]


def test_options_are_read_in_pythons_notation() -> None:
    given = ["epsilon=.1", "kernel=linear", "learned_token_mass=True", "num_anchors=None"]
    read = {"epsilon": 0.1, "kernel": "linear", "learned_token_mass": True, "num_anchors": None}
    assert _read(given) == read
    with pytest.raises(ValueError, match="expected OPTION=VALUE, got epsilon"):
        _read(["epsilon"])


def test_a_run_comes_back_from_the_record(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert records.load(file) == []
    runs = [run(each) for each in missing([], "points", "SeT")]
    runs.append(replace(runs[0], test=None, plan=replace(runs[0].plan, study=True)))
    for each in runs:
        records.append(each, file)
    assert records.load(file) == runs


def test_the_record_in_the_repository_can_be_read() -> None:
    runs = records.load()
    for each in runs:
        assert each.plan.task in TASKS
        assert each.plan.mixer in MIXERS
        assert 0 <= each.validation <= 1
        assert (each.test is None) == each.plan.study
    assert not [each.plan for i, each in enumerate(runs) if each.plan in [r.plan for r in runs[:i]]]


def test_two_commands_do_not_run_the_same(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    with records.held(file), pytest.raises(BlockingIOError, match="another command runs what"):
        records.held(file).__enter__()
    with records.held(file):
        pass


def test_accuracy_is_of_what_is_asked() -> None:
    network = nn.Identity()
    inputs = F.one_hot(torch.tensor([[0, 1, 2], [1, 1, 0], [2, 2, 2]]), 3).float()
    labels = torch.tensor([[0, IGNORED, 1], [IGNORED, 1, IGNORED], [IGNORED] * 3])

    class Network(nn.Module):
        def forward(self, inputs: torch.Tensor, mask: None) -> torch.Tensor:
            return network(inputs)

    assert accuracy(Network(), Samples(inputs, labels), batch_size=2) == pytest.approx(2 / 3)


def test_references_norms_and_biases_do_not_decay() -> None:
    options = options_of("SeT", 4, {})
    network = make_network(TASKS["recall-8"], "SeT", options)
    decaying, others = make_optimizer(network, 1e-3).param_groups
    assert decaying["weight_decay"] > 0
    assert others["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decay = {names[id(parameter)] for parameter in decaying["params"]}
    assert len(decay) + len(others["params"]) == len(names)
    assert {name.rsplit(".", 1)[-1] for name in decay} == {"weight"}
    assert "blocks.0.mixer.key.weight" in decay
    assert "blocks.0.mixer_norm.weight" not in decay


@pytest.mark.slow
def test_costs_of_a_step_are_kept_for_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another recipe, or of an attention that has other options by now, there are none."""
    monkeypatch.setattr(costs, "FILE", tmp_path / "costs.json")
    threads = torch.get_num_threads()
    try:
        costs.measure("recall-8", ["none", "SeT"], tmp_path)
    finally:
        torch.set_num_threads(threads)
    found = costs.load("recall-8")
    batch_and_hidden = 64 * 24 * 64 * 4 / 2**20  # one activation of a block, MiB
    for cost in found.values():
        assert cost.milliseconds > 0
        assert cost.mebibytes > 2 * 8 * batch_and_hidden  # two blocks, eight of them at least
    assert found.keys() == {"none", "SeT"}
    fewer = replace(TASKS["recall-8"], references=8)
    monkeypatch.setitem(TASKS, "recall-8", fewer)
    assert costs.load("recall-8").keys() == {"none"}
    monkeypatch.setitem(TASKS, "recall-8", replace(fewer, version=99))
    assert costs.load("recall-8") == {}


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


@pytest.mark.slow
def test_a_training_learns_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Data(*(_are_there_two_alike(count, count) for count in (2000, 201, 202)))
    monkeypatch.setitem(TASKS, "tiny", _tiny(lambda _folder: parts))
    threads = torch.get_num_threads()
    try:
        none, softmax, made, again = (
            train(plan("tiny", mixer, 6e-3, 0, study=study), Path())
            for mixer, study in (("none", False), ("softmax", False), ("SeT", False), ("SeT", True))
        )
    finally:
        torch.set_num_threads(threads)
    assert none.validation < 0.75  # single tokens tell nothing, their mean little
    for each in (softmax, made):
        assert each.validation > 0.85
        assert each.test > 0.85
        assert each.milliseconds > 0
        assert each.mebibytes > 0
    assert again.test is None
    assert (made.loss, made.validation) == (again.loss, again.validation)


@pytest.mark.slow
def test_schedule_runs_what_is_missing_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.jsonl"
    monkeypatch.setattr(schedule, "load", lambda: records.load(file))
    monkeypatch.setattr(schedule, "append", lambda made: records.append(made, file))
    monkeypatch.setattr(schedule, "held", lambda: records.held(file))
    monkeypatch.setattr(schedule, "train", _not_trained)
    with monkeypatch.context() as faster:
        faster.setattr(schedule, "ProcessPoolExecutor", _threads)
        made = list(schedule.run_missing("patches", ["none"], tmp_path, jobs=2))
    plans = [each.plan for each in made]
    assert len(plans) == len(LEARNING_RATES) + len(SEEDS) - 1
    assert all(plans.count(each) == 1 for each in plans)
    assert list(schedule.run_missing("patches", ["none"], tmp_path, jobs=2)) == []
    monkeypatch.setattr(schedule, "train", _fails_at_one_rate)
    with pytest.raises(RuntimeError, match="this one fails"):
        list(schedule.run_missing("patches", ["mean"], tmp_path, jobs=2))
    kept = [each.plan.learning_rate for each in records.load(file) if each.plan.mixer == "mean"]
    assert kept == [LEARNING_RATES[1]]  # which ran beside it


def _threads(jobs: int, *_context: object, **_options: object) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(jobs)


def _not_trained(plan: Plan, folder: Path) -> Run:
    return run(plan, validation=plan.learning_rate)


def _fails_at_one_rate(plan: Plan, folder: Path) -> Run:
    if plan.learning_rate == LEARNING_RATES[0]:
        raise RuntimeError("this one fails")
    time.sleep(1)
    return run(plan)


@pytest.fixture
def fake_images(monkeypatch: pytest.MonkeyPatch) -> dict[float, int]:
    """Images of one brightness each, of no other; the classes by brightness."""
    generator = torch.Generator().manual_seed(0)
    brightness = torch.randperm(1200, generator=generator) / 1200
    labels = torch.randint(10, (1200,), generator=generator)
    whole = brightness[:, None, None].expand(-1, 28, 28)
    parts = (whole[:1000], labels[:1000], whole[1000:], labels[1000:])
    for module in (images, garments):
        monkeypatch.setattr(module, "load_images", lambda: parts)
        monkeypatch.setattr(module, "HELD_OUT", 200)
    return dict(zip(brightness.tolist(), labels.tolist(), strict=True))


def _brightness(patches: torch.Tensor) -> list[float]:  # [.., 49, 16] in [-1, 1]
    return [round(1200 * value) / 1200 for value in ((patches[:, 0, 0] + 1) / 2).tolist()]


def test_garments_are_pairs_of_one_class_or_two(fake_images: dict[float, int]) -> None:
    classes = {round(1200 * value): label for value, label in fake_images.items()}
    seen: list[set[float]] = []
    for part in garments.load(Path()):
        firsts, seconds = _brightness(part.inputs[:, :49]), _brightness(part.inputs[:, 49:])
        one, other = ([classes[round(1200 * v)] for v in values] for values in (firsts, seconds))
        assert part.labels.tolist() == [int(a == b) for a, b in zip(one, other, strict=True)]
        assert 0.35 < part.labels.float().mean() < 0.65
        seen.append({*firsts, *seconds})
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


def test_points_are_pixels_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.rand(30, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 10
    monkeypatch.setattr(images, "load_images", lambda: (pictures, labels, pictures, labels))
    monkeypatch.setattr(images, "HELD_OUT", 10)
    for part, of_part in zip(
        images.load_points(Path()), (pictures[:20], pictures[20:], pictures), strict=True
    ):
        column, row = (part.inputs[..., :2] * 28 - 0.5).round().long().unbind(-1)
        picture = torch.arange(len(part.inputs)).unsqueeze(1)
        assert torch.equal(part.inputs[..., 2], of_part[picture, row, column])
        assert all(len(set(pixels)) == 128 for pixels in (28 * row + column).tolist())


def test_patches_are_cut_row_by_row() -> None:
    image = torch.arange(28 * 28.0).view(1, 28, 28) / (28 * 28)
    patches = (images.cut(image) + 1) / 2 * (28 * 28)
    assert patches.shape == (1, 49, 16)
    torch.testing.assert_close(patches[0, 8, :5], torch.tensor([116.0, 117, 118, 119, 144]))


def test_sentences_of_a_word_stay_together() -> None:
    words = [[["a", "b"], ["c"]], [["d", "c"]], [["e"], ["f"]]]
    components = senses._components(words)
    assert len({components[each] for each in "abcd"}) == 1
    assert components["e"] == components["f"] != components["a"]
