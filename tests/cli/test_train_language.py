"""Training of language encoders: GLUE's files, what is wrong with them, and what is learned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from setformer_ext import cli, language
from setformer_ext.cli.train.glue import Scores
from setformer_ext.cli.train.glue_data import TASKS, read_examples
from setformer_ext.cli.train.mlm import Packed
from setformer_ext.cli.train.task import DataError
from setformer_ext.cli.train.texts import SPECIAL, train_tokenizer, wrap_tokenizer
from training import launch, metrics, run_command

GOOD, BAD = ("superb", "lovely", "great", "moving"), ("dull", "awful", "poor", "tired")
TINY = (
    "--model-options",
    "hidden_size=32",
    "num_hidden_layers=1",
    "num_attention_heads=4",
    "num_references=4",
    "hidden_dropout_prob=0.05",
)
# Rows in the very layout of the download's files: header, then two rows.
FILES = {
    "cola": (
        "gj04\t1\t\tOur friends won't buy this analysis.",
        'gj04\t0\t*\tThe "mechanical doll wriggled itself loose.',
    ),
    "sst2": ("sentence\tlabel", "hide new secretions \t0", "that loves its characters \t1"),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tHe called "the witness.\tThe "witness" was called.',
        "0\t2108705\t2108831\tYucaipa owned it.\tIt was bought by Yucaipa.",
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000",
        "1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA man.\tA flute.\t3.800",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow is life?\tWhat is life?\t0",
        "402555\t536040\t536041\tHow do I?\tHow can I?\t1",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t31193\t31193n\tgovernment\t( a )\t( b )\t(R a)\t(R b)\tIt has two.\tProduct.\tneutral\t"
        "neutral",
        "1\t101457\t101457e\ttelephone\t( a )\t( b )\t(R a)\t(R b)\tYou know.\tYou lose.\t"
        "entailment\tentailment",
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\tWhen did it?\tIt did.\tentailment",
        "1\tWhat is it?\tThe rest.\tnot_entailment",
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tNo weapons.\tWeapons found.\tnot_entailment",
        "1\tA place.\tOf sorrow.\tentailment",
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tI stuck a pin.\tThe carrot had a hole.\t1",
        "1\tJohn couldn't see.\tJohn is so short.\t0",
    ),
}
EXPECTED = {
    "cola": (("Our friends won't buy this analysis.",), [1, 0]),
    "sst2": (("hide new secretions ",), [0, 1]),
    "mrpc": (('He called "the witness.', 'The "witness" was called.'), [1, 0]),
    "stsb": (("A plane.", "An air plane."), [5.0, 3.8]),
    "qqp": (("How is life?", "What is life?"), [0, 1]),
    "mnli": (("It has two.", "Product."), [1, 2]),
    "qnli": (("When did it?", "It did."), [1, 0]),
    "rte": (("No weapons.", "Weapons found."), [0, 1]),
    "wnli": (("I stuck a pin.", "The carrot had a hole."), [1, 0]),
}


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


def reviews(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Short reviews whose one telling word says which they are."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(generator.integers(2))
        word = generator.choice(GOOD if label else BAD)
        rows.append((f"the {generator.choice(['film', 'plot', 'cast'])} is {word} .", label))
    return rows


def write_reviews(root: Path, train: int = 160, dev: int = 40) -> Path:
    folder = root / "SST-2"
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 0), ("dev", dev, 1)):
        lines = [f"{text}\t{label}" for text, label in reviews(count, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reviews.txt"
    path.write_text("\n".join(text for text, _ in reviews(400)))
    path.with_suffix(".dev").write_text("\n".join(text for text, _ in reviews(100, seed=1)))
    return path


def pretraining(text: Path, output: Path, *more: object) -> list[str]:
    given = ["train", "mlm", f"--data={text}", f"--output={output}", "--model=mini", *TINY]
    if text.with_suffix(".dev").exists():
        given += ["--eval-data", str(text.with_suffix(".dev"))]
    given += ["--vocab-size=120", "--sequence-length=16", "--batch-size=16", "--workers=0"]
    return [*given, *map(str, more)]


@pytest.fixture(scope="module")
def pretrained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("pretrained")
    assert cli.main(pretraining(text, output, "--steps=250", "--eval-every=125", "--lr=1e-2")) == 0
    return output


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_tasks_file_is_read(name: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(end.join([*FILES[name], ""]).encode())
    examples = read_examples(path, TASKS[name], "part")
    texts, labels = EXPECTED[name]
    assert examples[0].texts == texts
    assert [example.label for example in examples] == labels
    assert {example.part for example in examples} == {"part"}


def test_texts_with_strange_characters_stay_one_row(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\na\u2028b\x85c "d\x0ce\t1\n', encoding="utf-8", newline="\n")
    assert read_examples(path, TASKS["sst2"])[0].texts == ('a\u2028b\x85c "d\x0ce',)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "columns": ("sst2", b"a\t1\tb", "expected 2 tab-separated columns, got 3"),
    "empty": ("sst2", b" \t1", "sentence: expected a text, got nothing"),
    "class": ("sst2", b"a\tx", "label: expected one of 0, 1, got 'x'"),
    "number": (
        "stsb",
        b"0\tm\tM\t1\t1\tn\tn\ta\tb\tnan",
        "score: expected a number from 0 to 5, got 'nan'",
    ),
    "encoding": ("sst2", b"caf\xe9\t1", "expected UTF-8, got the byte 0xe9 at column 4"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_malformed_rows_are_named_or_left_out(kind: str, tmp_path: Path) -> None:
    name, row, message = BROKEN[kind]
    path = tmp_path / "train.tsv"
    content = "\n".join(FILES[name]).encode() + b"\n" + row + b"\n"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_examples(path, TASKS[name])
    assert f"{path}, line 4: {message} (--on-error skip" in str(caught.value)
    problems: list[str] = []
    assert len(read_examples(path, TASKS[name], problems=problems)) == 2
    assert problems == [f"{path}, line 4: {message}"]


def test_files_that_are_none_of_the_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*; expected GLUE's own download, with RTE"):
        read_examples(tmp_path / "train.tsv", TASKS["rte"])
    path = tmp_path / "other.tsv"
    path.write_text("\n".join(FILES["sst2"]))
    with pytest.raises(DataError, match="line 1: expected the columns sentence1, sentence2, label"):
        read_examples(path, TASKS["rte"])
    path.write_text(FILES["rte"][0])
    with pytest.raises(DataError, match="no row that can be used"):
        read_examples(path, TASKS["rte"])


def answer_of(values: list[float], regression: bool) -> Callable[..., Any]:
    """A model that gives these answers."""

    def model(**_: object) -> Any:
        logits = torch.tensor(values)[:, None]
        if not regression:
            logits = torch.eye(3)[logits[:, 0].long()]
        return type("Answer", (), {"logits": logits})

    return model


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("cola", {"matthews": matthews_corrcoef}),
        ("mrpc", {"accuracy": lambda y, x: np.mean(y == x), "f1": f1_score}),
        (
            "stsb",
            {
                "pearson": lambda y, x: pearsonr(y, x)[0],
                "spearman": lambda y, x: spearmanr(y, x)[0],
            },
        ),
    ],
)
def test_scores_are_glues(name: str, known: dict[str, Callable[..., float]]) -> None:
    task = TASKS[name]
    generator = np.random.default_rng(0)
    regression = not task.classes
    labels = generator.integers(0, 2, 60).astype(float)
    answers = np.where(generator.random(60) < 0.7, labels, 1 - labels)
    if regression:
        answers = answers + generator.normal(size=60)
    scores = Scores(task)
    for part in np.split(np.arange(60), [20, 45]):
        model: Any = answer_of(answers[part].tolist(), regression)
        scores.update(model, ({}, torch.tensor(labels[part]), [""] * len(part)))
    figures = scores.compute()
    for metric, function in known.items():
        assert figures[metric] == pytest.approx(function(labels, answers), abs=1e-6)
    assert figures["score"] == pytest.approx(np.mean([figures[metric] for metric in known]))


def test_both_files_of_mnli_count_alike() -> None:
    scores = Scores(TASKS["mnli"])
    model: Any = answer_of([0, 1, 2, 2], regression=False)
    parts = ["matched", "matched", "matched", "mismatched"]
    scores.update(model, ({}, torch.tensor([0, 1, 0, 2]), parts))
    figures = scores.compute()
    assert figures["accuracy_matched"] == pytest.approx(2 / 3)
    assert figures["accuracy_mismatched"] == 1
    assert figures["score"] == pytest.approx(5 / 6)


def test_words_are_masked_anew_each_time_in_berts_shares() -> None:
    tokenizer = wrap_tokenizer(train_tokenizer([t for t, _ in reviews(50)], 100, lowercase=True))
    documents = [np.array(tokenizer(t, add_special_tokens=False).input_ids) for t, _ in reviews(9)]
    packed = Packed(documents, 8, tokenizer)
    joined = np.concatenate([np.append(d, tokenizer.sep_token_id) for d in documents])
    assert len(packed) == len(joined) // 6
    torch.manual_seed(0)
    samples = [packed[index % len(packed)] for index in range(3000)]
    chosen = kept = masked = words = 0
    for index, (tokens, labels) in enumerate(samples):
        start = index % len(packed) * 6
        truth = torch.tensor([2, *joined[start : start + 6], 3])
        predicted = labels != -100
        assert torch.equal(labels[predicted], truth[predicted])
        assert torch.equal(tokens[~predicted], truth[~predicted])
        assert (truth[predicted] >= len(SPECIAL)).all()
        words += int((truth >= len(SPECIAL)).sum())
        chosen += int(predicted.sum())
        masked += int((tokens[predicted] == tokenizer.mask_token_id).sum())
        kept += int((tokens[predicted] == truth[predicted]).sum())
    # Four standard deviations of shares of so many; a random word is the same one now and then.
    assert abs(chosen / words - 0.15) < 4 * (0.15 * 0.85 / words) ** 0.5
    assert abs(masked / chosen - 0.8) < 4 * (0.8 * 0.2 / chosen) ** 0.5
    assert 0.1 - 4 * (0.1 * 0.9 / chosen) ** 0.5 < kept / chosen < 0.15
    assert len({tuple(packed[0][0].tolist()) for _ in range(9)}) > 1


def test_the_same_text_gives_the_same_tokenizer_and_unknown_letters_do_not_crowd_it() -> None:
    texts = [text for text, _ in reviews(60)] + [chr(0x4E00 + i) * 3 for i in range(1200)]
    made = {train_tokenizer(texts, 400, lowercase=True) for _ in range(5)}
    assert len(made) == 1
    tokenizer = wrap_tokenizer(made.pop())
    assert tokenizer.tokenize("the film") == ["the", "film"]
    assert tokenizer.tokenize("\u4e00 \u52af") == ["\u4e00", "[UNK]"]
    assert len(tokenizer) <= 400


def test_the_tokenizer_marks_pairs_and_special_tokens() -> None:
    tokenizer = wrap_tokenizer(train_tokenizer(["the film is dull"] * 9, 100, lowercase=True))
    encoded = tokenizer("The FILM", "is dull")
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert names == ["[CLS]", "the", "film", "[SEP]", "is", "dull", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.pad_token_id == 0


@pytest.mark.slow
def test_pretraining_learns_and_is_a_model_of_transformers(pretrained: Path) -> None:
    result = metrics(pretrained)
    assert result["best"]["accuracy"] > 0.5  # the commonest word has a share of 0.2
    assert result["last"]["perplexity"] < 8  # of 20 words
    model = AutoModelForMaskedLM.from_pretrained(pretrained).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    tokens = tokenizer("the film [MASK] dull .", return_tensors="pt")
    place = int((tokens["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    assert tokenizer.decode(model(**tokens).logits[0, place].argmax()) == "is"


@pytest.mark.slow
def test_pretraining_resumes_after_a_stop_to_the_same_numbers(text: Path, tmp_path: Path) -> None:
    length = ("--eval-every=3", "--save-every=2", "--steps=7")
    assert launch(1, run_command, pretraining(text, tmp_path / "whole", *length)) == [0]
    stopped = tmp_path / "stopped"
    assert launch(1, stop_at, 5, pretraining(text, stopped, *length)) == [9]
    assert launch(1, run_command, pretraining(text, stopped, *length, "--resume")) == [0]
    assert metrics(stopped)["history"] == metrics(tmp_path / "whole")["history"]
    known = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(stopped / "model.safetensors").items():
        assert torch.equal(tensor, known[name]), name


def stop_at(step: int, given: list[str]) -> None:
    """Die as by a kill, in the middle of a step."""
    import os

    from setformer_ext.cli.train.loop import Training

    take = Training._step

    def stop(self: Training, batches: Any) -> None:
        if self.progress.step == step:
            os._exit(9)
        take(self, batches)

    Training._step = stop  # type: ignore[method-assign]
    cli.main(given)


@pytest.mark.slow
def test_fine_tuning_resumes_after_a_stop_to_the_same_numbers(
    pretrained: Path, tmp_path: Path
) -> None:
    data = write_reviews(tmp_path / "glue")
    length = ("--eval-every=3", "--save-every=2", "--steps=7")
    assert launch(1, run_command, glue(data, pretrained, tmp_path / "whole", *length)) == [0]
    stopped = tmp_path / "stopped"
    assert launch(1, stop_at, 5, glue(data, pretrained, stopped, *length)) == [9]
    assert launch(1, run_command, glue(data, pretrained, stopped, *length, "--resume")) == [0]
    assert metrics(stopped)["history"] == metrics(tmp_path / "whole")["history"]
    known = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(stopped / "model.safetensors").items():
        assert torch.equal(tensor, known[name]), name


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_with_the_whole_batch(
    pretrained: Path, tmp_path: Path
) -> None:
    """Scores are of all processes' rows, of which one has more than the other."""
    data = write_reviews(tmp_path / "glue", dev=41)
    histories = []
    for processes in (1, 2):
        given = glue(data, pretrained, tmp_path / str(processes), "--steps=4", "--eval-every=2")
        given += [f"--batch-size={16 // processes}"]
        given += ["--model-options", "hidden_dropout_prob=0.0"]  # each process draws its own
        assert launch(processes, run_command, given) == [0] * processes
        histories.append(metrics(tmp_path / str(processes))["history"])
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def glue(data: Path, model: Path, output: Path, *more: object) -> list[str]:
    given = ["train", "glue", "--task=sst2", f"--data={data}", f"--model={model}"]
    return [*given, f"--output={output}", "--workers=0", *map(str, more)]


@pytest.mark.slow
def test_fine_tuning_learns_the_telling_words(pretrained: Path, tmp_path: Path) -> None:
    data, output = write_reviews(tmp_path / "glue"), tmp_path / "run"
    assert cli.main(glue(data, pretrained, output, "--epochs=12", "--lr=2e-3")) == 0
    assert metrics(output)["best"]["score"] > 0.95
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokens = AutoTokenizer.from_pretrained(output)(
        ["the cast is superb .", "the plot is awful ."], return_tensors="pt"
    )
    assert model(**tokens).logits.argmax(1).tolist() == [1, 0]
    assert json.loads((output / "card.json").read_text())["glue_task"] == "sst2"


@pytest.mark.slow
def test_two_processes_sharded_or_not_learn_the_same(text: Path, tmp_path: Path) -> None:
    """With the words' embeddings, which the decoder shares."""
    length = ("--steps=3", "--eval-every=3")
    assert launch(2, run_command, pretraining(text, tmp_path / "ddp", *length)) == [0, 0]
    sharded = pretraining(text, tmp_path / "fsdp", *length, "--shard")
    assert launch(2, train_in_small_shards, sharded) == [0, 0]
    (replicated,), (split,) = (metrics(tmp_path / kind)["history"] for kind in ("ddp", "fsdp"))
    assert split["perplexity"] == pytest.approx(replicated["perplexity"], rel=1e-4)
    weights = load_file(tmp_path / "fsdp" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "ddp" / "model.safetensors").items():
        # Adam's steps of lr go by the signs of gradients, which rounding can turn.
        torch.testing.assert_close(weights[name], tensor, atol=2e-3, rtol=0)


def train_in_small_shards(given: list[str]) -> None:
    from setformer_ext.cli.train import parallel

    parallel.SHARD_PARAMETERS = 500
    run_command(given)


@pytest.mark.slow
def test_set_attention_in_another_model_keeps_its_options(tmp_path: Path) -> None:
    tokenizer = wrap_tokenizer(train_tokenizer([t for t, _ in reviews(50)], 100, lowercase=True))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    data, output = write_reviews(tmp_path / "glue"), tmp_path / "run"
    given = glue(data, tmp_path / "bert", output, "--epochs=12", "--lr=2e-3")
    given += ["--attention-implementation=set_attention"]
    given += ["--model-options", "set_attention={'num_references': 5}"]
    assert cli.main(given) == 0
    assert metrics(output)["best"]["score"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(
        output, attn_implementation="set_attention"
    )
    assert model.config.set_attention == {"num_references": 5, "epsilon": None, "iterations": 1}
    assert model.config.architectures == ["BertForSequenceClassification"]
    trained = load_file(output / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.set_attention.reference"
    assert torch.equal(model.state_dict()[name], trained[name])


def test_options_given_to_a_switched_model_leave_those_it_was_saved_with(tmp_path: Path) -> None:
    """A model that was trained without transport goes on without."""
    language.register()
    tokenizer = wrap_tokenizer(train_tokenizer([t for t, _ in reviews(50)], 100, lowercase=True))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)
    config.set_attention = {"num_references": 5, "iterations": 0}
    bert = BertModel._from_config(config, attn_implementation="set_attention")
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    data, output = write_reviews(tmp_path / "glue"), tmp_path / "run"
    given = glue(data, tmp_path / "bert", output, "--steps=1")
    given += ["--attention-implementation=set_attention", "--model-options"]
    assert cli.main([*given, "set_attention={'epsilon': 3.0}"]) == 0
    saved = json.loads((output / "config.json").read_text())
    assert saved["set_attention"] == {"num_references": 5, "epsilon": 3.0, "iterations": 0}
    names = {name.rpartition(".")[2] for name in load_file(output / "model.safetensors")}
    assert not names & {"mass_point", "reference_log_mass"}


def test_rows_left_out_are_counted(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_reviews(tmp_path / "glue")
    path = data / "SST-2" / "train.tsv"
    path.write_text(path.read_text() + "no label\nworse\t7\n")
    assert cli.main(glue(data, pretrained, tmp_path / "stop", "--steps=1")) == 1
    message = "line 162: expected 2 tab-separated columns, got 1 (--on-error skip"
    assert message in capsys.readouterr().err
    skip = ("--steps=1", "--on-error=skip")
    assert cli.main(glue(data, pretrained, tmp_path / "skip", *skip)) == 0
    assert "2 rows were left out: " in capsys.readouterr().out


def test_several_tasks_and_their_average(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_reviews(tmp_path / "glue")
    for name in ("rte", "stsb"):
        folder = data / TASKS[name].folder
        folder.mkdir()
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_text("\n".join([*FILES[name], ""]))
    given = glue(data, pretrained, tmp_path / "runs", "--steps=2")
    given[2:3] = ["--task", "sst2", "rte", "stsb"]
    assert cli.main(given) == 0
    scores = [
        metrics(tmp_path / "runs" / name)["best"]["score"] for name in ("sst2", "rte", "stsb")
    ]
    printed = capsys.readouterr().out.rstrip().split("\n")[-1]
    assert printed.split() == ["average", f"{np.mean(scores):.4f}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model=/nowhere"], "--model: expected a folder with a model and a tokenizer"),
        (["--model-options", "hidden_droput=0.2"], "SetformerConfig has no hidden_droput"),
        (["--model-options", "hidden_size=64"], "weights of"),
        (["--data=/nowhere"], "there is no /nowhere/SST-2/train.tsv"),
        (["--attention-implementation=set_attention"], "set_attention"),
        (
            ["--model-options", "set_attention=5"],
            "set_attention must be a mapping",
        ),
    ],
)
def test_what_the_user_can_put_right(
    change: list[str],
    message: str,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_reviews(tmp_path / "glue")
    assert cli.main([*glue(data, pretrained, tmp_path / "run", "--steps=1"), *change]) == 1
    assert message in capsys.readouterr().err


def test_too_little_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.txt"
    few.write_text("the film is dull .\n")
    assert cli.main(pretraining(few, tmp_path / "run")) == 1
    assert "expected at least one sequence of 16" in capsys.readouterr().err
    assert cli.main(pretraining(tmp_path / "none", tmp_path / "run")) == 1
    assert "there is no" in capsys.readouterr().err
    assert cli.main([*pretraining(text, tmp_path / "run"), "--model-options", "num_refs=3"]) == 1
    assert "SetformerConfig has no num_refs" in capsys.readouterr().err
    few.write_bytes(b"good\nb\xffd\n")
    assert cli.main(pretraining(few, tmp_path / "run")) == 1
    assert (
        f"{few}, line 2: expected UTF-8, got the byte 0xff at column 2" in capsys.readouterr().err
    )
