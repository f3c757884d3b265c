"""setformer predict on texts: answers are the model's, and GLUE's server takes its files."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
)

from setformer_ext import cli, language
from setformer_ext.cli.train.glue_data import TASKS
from text_runs import LENGTH, TEXTS, write_text_run

SINGLE = "index\tsentence"
PAIR = "index\tsentence1\tsentence2"
MNLI = "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
# Of each task: its test file in the download, the header there, a row, and the server's file.
TESTS = {
    "cola": [("CoLA/test.tsv", SINGLE, "{}\tthe cast is dull .", "CoLA.tsv")],
    "sst2": [("SST-2/test.tsv", SINGLE, "{}\tso superb a film", "SST-2.tsv")],
    "mrpc": [
        (
            "MRPC/test.tsv",
            "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '{}\t1\t2\tthe "film\tplot',
            "MRPC.tsv",
        )
    ],
    "stsb": [
        (
            "STS-B/test.tsv",
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
            "{}\tmain\tx\t2017\t1\ta\tb\tthe film\tthe plot",
            "STS-B.tsv",
        )
    ],
    "qqp": [("QQP/test.tsv", "id\tquestion1\tquestion2", "{}\tis it ?\t", "QQP.tsv")],
    "mnli": [
        ("MNLI/test_matched.tsv", MNLI, "{}\t1\t1n\tg\t(\t)\ta film\tso dull", "MNLI-m.tsv"),
        ("MNLI/test_mismatched.tsv", MNLI, "{}\t1\t1n\tg\t(\t)\tit is\ta plot", "MNLI-mm.tsv"),
        ("diagnostic/diagnostic.tsv", PAIR, "{}\tthe cast\tis tired", "AX.tsv"),
    ],
    "qnli": [("QNLI/test.tsv", "index\tquestion\tsentence", "{}\tis it ?\tit is .", "QNLI.tsv")],
    "rte": [("RTE/test.tsv", PAIR, "{}\tthe film\tis dull", "RTE.tsv")],
    "wnli": [("WNLI/test.tsv", PAIR, "{}\tthe plot\tso tired", "WNLI.tsv")],
}
LABELS = {
    **{task: {"0", "1"} for task in ("cola", "sst2", "mrpc", "qqp", "wnli")},
    **{task: {"entailment", "not_entailment"} for task in ("qnli", "rte")},
    "mnli": {"entailment", "neutral", "contradiction"},
}


def predict(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what the preparation printed
    status = cli.main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def write_test_files(data: Path, task: str, rows: int = 70) -> Path:
    """More rows than a batch, numbered from 3 on. Each ends in words of its own, up to seven."""
    draw, words = random.Random(0), " ".join(TEXTS).split()
    for source, header, row, _ in TESTS[task]:
        (data / source).parent.mkdir(parents=True, exist_ok=True)
        lines = [header]
        for index in range(3, 3 + rows):
            own = draw.choices(words, k=index % 8)
            lines.append(" ".join([row.format(index), *own]))
        (data / source).write_text("\n".join([*lines, ""]))
    return data


@pytest.mark.parametrize("task", TESTS)
def test_test_files_are_answered_as_the_server_wants(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every row by what the model says to it alone."""
    run = write_text_run(tmp_path / "run", task)
    data = write_test_files(tmp_path / "glue", task)
    assert predict(capsys, run, "--data", data, "--output", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {t[3] for t in TESTS[task]}
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    order_shows = False
    for source, header, _, name in TESTS[task]:
        lines = (tmp_path / "out" / name).read_text().split("\n")
        assert (lines[0], lines[-1]) == ("index\tprediction", "")
        indices, labels = zip(*(line.split("\t") for line in lines[1:-1]), strict=True)
        assert list(indices) == [str(index) for index in range(3, 73)]
        columns = header.split("\t")
        expected = []
        for row in (data / source).read_text().split("\n")[1:-1]:
            cells = row.split("\t")
            # In lists: an empty second text by itself counts as none.
            texts = [[cells[columns.index(column)]] for column in TASKS[task].texts]
            inputs = tokenizer(*texts, truncation=True, max_length=LENGTH, return_tensors="pt")
            with torch.no_grad():
                expected.append(model(**inputs).logits[0])
        if task == "stsb":
            numbers = [float(number.clamp(0, 5)) for number in expected]
            # Four decimals, and the rounding of float32 in a batch.
            assert [float(label) for label in labels] == pytest.approx(numbers, abs=6e-5)
        else:
            assert {*labels} <= LABELS[task]
            assert [*labels] == [model.config.id2label[int(x.argmax())] for x in expected]
        order_shows |= labels[:64] != labels[63::-1]
    assert order_shows


def test_mnlis_diagnostic_may_be_missing_and_several_trainings_answer_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for task in ("mnli", "rte"):
        write_text_run(tmp_path / "runs" / task, task)
        write_test_files(tmp_path / "glue", task, rows=2)
    (tmp_path / "glue" / "diagnostic" / "diagnostic.tsv").unlink()
    given = (tmp_path / "runs", "--data", tmp_path / "glue", "--output", tmp_path / "out")
    status, out, err = predict(capsys, *given)
    assert status == 0
    assert "AX.tsv is left out" in out
    assert "it/s" not in err  # no bar, as nobody watches
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv")
    }


@pytest.mark.parametrize("spoil", ["no file", "mlm"])
def test_nothing_is_answered_if_a_later_training_cannot(
    spoil: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for folder, task in (("a", "rte"), ("b", "mlm" if spoil == "mlm" else "cola")):
        write_text_run(tmp_path / "runs" / folder, task)
    write_test_files(tmp_path / "glue", "rte", rows=2)
    given = (tmp_path / "runs", "--data", tmp_path / "glue", "--output", tmp_path / "out")
    status, _, err = predict(capsys, *given)
    message = "b: a training of mlm, expected one of glue" if spoil == "mlm" else "there is no "
    assert (status, message in err) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ("", "expected the columns index, sentence1, sentence2, got nothing"),
        ("index\tsentence\n", "expected the columns index, sentence1, sentence2"),
        (f"{PAIR}\n0\ta\tb\n1\ta\n", "line 3: expected 3 tab-separated columns, got 2"),
        (f"{PAIR}\n", "has no rows"),
    ],
)
def test_test_files_that_cannot_be_answered(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_text_run(tmp_path / "run", "rte")
    path = tmp_path / "glue" / "RTE" / "test.tsv"
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_text(content)
    given = (run, "--data", tmp_path / "glue", "--output", tmp_path / "out")
    status, _, err = predict(capsys, *given)
    assert status == 1
    assert str(path) in err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_texts_get_classes_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_text_run(tmp_path / "run", "sst2")
    texts = ["the film is superb .", "so dull"]
    report, table = tmp_path / "a.json", tmp_path / "a.csv"
    given = [run, *(part for text in texts for part in ("--text", text))]
    status, out, _ = predict(capsys, *given, "--json", report, "--csv", table)
    assert status == 0
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    answers = json.loads(report.read_text())
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 4
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert answer["text"] == text
        found = {entry["name"]: entry["probability"] for entry in answer["classes"]}
        assert found == pytest.approx({"0": float(expected[0]), "1": float(expected[1])}, abs=1e-5)
        assert found == pytest.approx(
            {row["name"]: float(row["probability"]) for row in rows if row["text"] == text}
        )
        assert f"{text}: {answer['classes'][0]['name']} " in out
    run = write_text_run(tmp_path / "pairs", "stsb")
    status, out, err = predict(capsys, run, "--text", "a film", "so " * 20, "--json", report)
    assert status == 0
    assert f"cut to {LENGTH} tokens from 25" in err
    (answer,) = json.loads(report.read_text())
    assert (answer["text1"], f"{answer['number']:.3f}" in out) == ("a film", True)


def test_masks_are_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, report = write_text_run(tmp_path / "run", "mlm"), tmp_path / "a.json"
    text = "the [MASK] is [MASK] ."
    status, out, _ = predict(capsys, run, "--text", text, "--json", report)
    assert status == 0
    (answer,) = json.loads(report.read_text())
    model = AutoModelForMaskedLM.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokens = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**tokens).logits[0].softmax(-1)
    for mask, place in ((1, 2), (2, 4)):
        top = probabilities[place].topk(5)
        found = [entry for entry in answer["words"] if entry["mask"] == mask]
        words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
        assert [entry["word"] for entry in found] == words
        assert [entry["probability"] for entry in found] == pytest.approx(top.values.tolist())
        tokens["input_ids"][0, place] = top.indices[0]
    assert answer["filled"] == tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True)
    assert answer["filled"] in out


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("sst2", ["--text", "a", "b"], "SST-2 needs sentence after each --text, got 2 texts"),
        ("rte", ["--text", "a"], "RTE needs sentence1 and sentence2 after each --text, got 1"),
        ("mlm", ["--text", "no mask"], "expected one text after each --text, with [MASK] in it"),
        ("mlm", ["--data", "."], "a training of mlm, expected one of glue"),
        ("mlm", ["photo.png"], "a training of mlm, expected one on images; this one takes --text"),
        ("mlm", [], "expected either IMAGE ..., --text or --data after RUN"),
        ("mlm", ["photo.png", "--text", "a"], "expected either IMAGE"),
    ],
)
def test_what_does_not_fit_is_explained(
    task: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = write_text_run(tmp_path / "run", task)
    capsys.readouterr()
    status, _, err = predict(capsys, run, *arguments)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_set_attention_in_other_models_is_what_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """transformers does not save that a model has it, the card does."""
    language.register()
    run, report = write_text_run(tmp_path / "run", "sst2"), tmp_path / "a.json"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=100, intermediate_size=64, **sizes)
    config.set_attention = {"num_references": 5}
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="set_attention"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(run)
    status, _, err = predict(capsys, run, "--text", "the film")
    assert (status, "self.set_attention" in err) == (1, True)
    card = json.loads((run / "card.json").read_text())
    card["attention_implementation"] = "set_attention"
    (run / "card.json").write_text(json.dumps(card))
    assert predict(capsys, run, "--text", "the film is dull", "--json", report)[0] == 0
    inputs = AutoTokenizer.from_pretrained(run)("the film is dull", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].softmax(-1)
    (answer,) = json.loads(report.read_text())
    assert answer["classes"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-5)


def test_spoiled_trainings_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    def message(run: Path) -> str:
        status, _, err = predict(capsys, run, "--text", "a")
        assert status == 1
        assert str(run) in err
        return err.strip()

    run = write_text_run(tmp_path / "run", "sst2")
    card = json.loads((run / "card.json").read_text())
    for changes, expected in (
        ({"glue_task": "dream"}, "lacks or does not know 'dream'"),
        ({"classes": ["a", "b", "c"]}, "3 classes, but the model has 2"),
        ({"task": "classify"}, "a training of classify, expected one of mlm or glue"),
    ):
        (run / "card.json").write_text(json.dumps(card | changes))
        assert expected in message(run)
    (run / "card.json").write_text(json.dumps(card))
    weights = load_file(run / "model.safetensors")
    weights["other"] = weights.pop("classifier.bias")
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    assert "classifier.bias and 1 more are missing, too many" in message(run)
    (run / "model.safetensors").write_bytes(b"junk")
    message(run)
    (run / "tokenizer.json").unlink()
    (run / "tokenizer_config.json").unlink()
    message(run)
