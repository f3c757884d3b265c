"""Text files of every encoding, hidden files, large scripts, and folders that are not there."""

import argparse
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fresh import fresh
from setformer_ext import cli
from setformer_ext.cli.train import backbones
from setformer_ext.cli.train.ade20k import read_names
from setformer_ext.cli.train.glue_data import TASKS, read_examples
from setformer_ext.cli.train.mlm import Mlm
from setformer_ext.cli.train.task import DataError, TrainingError
from setformer_ext.cli.train.texts import (
    read_documents,
    text_files,
    train_tokenizer,
    wrap_tokenizer,
)
from setformer_ext.errors import first_line
from setformer_ext.language import SetformerConfig, SetformerForMaskedLM, SetformerModel
from test_train_language import FILES, TINY, reviews, stop_at, write_reviews
from training import launch, metrics, run_command

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_references": 4}


@pytest.fixture(autouse=True)
def fresh_processes() -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.txt"
    path.write_text("\n".join(text for text, _ in reviews(300)), encoding="utf-8")
    return path


def make_tokenizer(size: int = 100) -> PreTrainedTokenizerFast:
    return wrap_tokenizer(train_tokenizer([t for t, _ in reviews(50)], size, lowercase=True))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder with its tokenizer, with sizes that are nobody's default."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = SetformerConfig(vocab_size=len(tokenizer) + 3, conv_kernel_size=3, **SIZES)
    SetformerForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def mlm(text: Path, output: Path, *more: object) -> list[str]:
    given = ["train", "mlm", f"--data={text}", f"--output={output}", "--sequence-length=16"]
    return [*given, "--batch-size=16", "--workers=0", *map(str, more)]


def glue(data: Path, model: Path, output: Path, *tasks: str) -> list[str]:
    given = ["train", "glue", f"--data={data}", f"--model={model}", f"--output={output}"]
    return [*given, "--workers=0", "--steps=1", "--task", *tasks]


READERS = """
    from pathlib import Path
    from setformer_ext import cli
    from setformer_ext.cli.predict.loading import read_card
    from setformer_ext.cli.train.ade20k import read_names
    from setformer_ext.cli.train.coco import _read
    from setformer_ext.cli.train.glue_data import TASKS, read_examples
    from setformer_ext.cli.train.options import TaskParser
    from setformer_ext.cli.train.texts import read_documents, text_files

    parser = TaskParser()
    parser.add_argument("--config")
    parser.add_argument("--colour")
    result = [
        [
            read_documents(text_files("--data", [root / "text"]), None),
            list(read_examples(root / "train.tsv", TASKS["sst2"])[0].texts),
            read_names(root, 0),
            read_names(root / "info", 1),
            [category["name"] for category in _read(root, root / "coco.json")["categories"]],
            read_card(root)["classes"],
            parser._entries(root / "config.yaml"),
        ]
        for root in map(Path, ROOTS)
    ]
    try:
        cli.main(["--version"])
    except SystemExit:
        print("B\\xe4ume")  # as a class may be named
"""


@pytest.mark.slow
def test_text_is_read_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    card = {
        "task": "classify",
        "model": "setformer_mini",
        "model_options": {},
        "classes": ["B\xe4"],
    }
    coco = {"images": [{}], "annotations": [], "categories": [{"name": "B\xe4"}]}
    files = {
        "text/a.txt": "B\xe4ume\n\u6728",
        "train.tsv": "sentence\tlabel\nB\xe4ume\t1\n",
        "classes.txt": "B\xe4ume\n\u6728\n",
        "info/objectInfo150.txt": "Idx\tName\n1\tB\xe4ume\n",
        "coco.json": json.dumps(coco, ensure_ascii=False),
        "card.json": json.dumps(card, ensure_ascii=False),
        "config.yaml": "colour: B\xe4ume\n",
        "model.safetensors": "",
    }
    expected = [
        ["B\xe4ume", "\u6728"],
        ["B\xe4ume"],
        ["B\xe4ume", "\u6728"],
        ["B\xe4ume"],
        ["B\xe4"],
        ["B\xe4"],
        ["--colour=B\xe4ume"],
    ]
    for kind, mark in (("plain", ""), ("marked", "\ufeff")):
        for name, content in files.items():
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(mark + content, encoding="utf-8")
    roots = [str(tmp_path / kind) for kind in ("plain", "marked")]
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    assert fresh(READERS.replace("ROOTS", repr(roots)), **environment) == [expected, expected]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_by_name(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("sentence\tlabel\nfine\t1\n", encoding=encoding)
    for skip in ([], None):  # whole files are not left out
        with pytest.raises(DataError, match=re.escape(f"{path}: not text in UTF-8")):
            read_documents([path], skip)
        with pytest.raises(DataError, match=re.escape(f"{path}: not text in UTF-8")):
            read_examples(path, TASKS["sst2"], problems=skip)
    with pytest.raises(DataError, match=re.escape(f"{path}: not text in UTF-8")):
        read_names(tmp_path, 0)


def test_a_broken_line_of_a_class_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"a\nb\xff\n")
    with pytest.raises(DataError, match=r"line 2: expected UTF-8, got the byte 0xff at column 2$"):
        read_names(tmp_path, 0)


def test_hidden_files_are_no_texts(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.TXT", ".a.txt", "a/._c.txt", ".trash/d.txt", "__MACOSX/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text")
    assert text_files("--data", [tmp_path]) == [tmp_path / "a" / "c.TXT", tmp_path / "b.txt"]
    assert text_files("--data", [tmp_path / ".a.txt"]) == [tmp_path / ".a.txt"]  # it was asked for


def large_script(letters: int, rows: int, isolated: bool) -> list[str]:
    """Texts of so many letters, of Zipf's frequencies: Chinese, or words of Hangul's syllables."""
    generator = np.random.default_rng(0)
    chances = 1 / np.arange(1, letters + 1)
    drawn = generator.choice(letters, (rows, 12), p=chances / chances.sum())
    first = 0x4E00 if isolated else 0xAC00
    lines = ["".join(chr(first + int(i)) for i in row) for row in drawn]
    return lines if isolated else [f"{line[:3]} {line[3:7]} {line[7:]}" for line in lines]


def unknown_share(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Of the words, as transformers splits texts into them."""
    words = unknown = 0
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False)
        words += len({*encoded.word_ids()})
        unknown += encoded.input_ids.count(tokenizer.unk_token_id)
    return unknown / words


@pytest.mark.parametrize("isolated", [True, False])
def test_scripts_of_many_letters_are_known(isolated: bool) -> None:
    texts = large_script(5000, 4000, isolated)
    used = len({*"".join(texts)})
    assert used > 2500
    tokenizer = wrap_tokenizer(train_tokenizer(texts, 30522, lowercase=False))
    assert unknown_share(tokenizer, texts[:500]) < 0.005
    few = wrap_tokenizer(train_tokenizer(texts, 30522, False, alphabet_size=300))
    alone = [token for token in few.get_vocab() if len(token) == 1]
    assert len(alone) == 300
    assert unknown_share(few, texts[:500]) > 0.05
    assert max(few.get_vocab().values()) < len(few) <= 30522


def test_many_unknown_words_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = large_script(400, 300, isolated=True)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    given = mlm(path, tmp_path / "run", "--steps=1", "--model=mini", *TINY)
    assert cli.main([*given, "--vocab-size=1000", "--alphabet=100"]) == 0
    printed = capsys.readouterr().out
    kept = [text for place, text in enumerate(texts) if place % 100 != 99]
    tokenizer = wrap_tokenizer(train_tokenizer(kept, 1000, True, 100))
    assert f"warning: {unknown_share(tokenizer, kept):.1%} of the words" in printed
    given[3] = f"--output={tmp_path / 'other'}"
    assert cli.main([*given, "--vocab-size=1000"]) == 0
    assert "warning" not in capsys.readouterr().out
    given[3] = f"--output={tmp_path / 'third'}"
    assert cli.main([*given, "--vocab-size=100", "--alphabet=300"]) == 1
    assert "--alphabet: 300 characters take more than the 100 tokens" in capsys.readouterr().err


def test_all_files_of_all_tasks_are_read_before_the_first_training(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_reviews(tmp_path / "glue"), tmp_path / "runs"
    for name in ("rte", "stsb"):
        folder = data / TASKS[name].folder
        folder.mkdir()
        (folder / "train.tsv").write_text("\n".join(FILES[name]), encoding="utf-8")
    (data / "RTE" / "dev.tsv").write_text("\n".join([*FILES["rte"], "broken"]), encoding="utf-8")
    assert cli.main(glue(data, encoder, output, "sst2", "rte", "stsb")) == 1
    error = capsys.readouterr().err
    assert f"{data}/RTE/dev.tsv, line 4: expected 4 tab-separated columns, got 1" in error
    assert f"there is no {data}/STS-B/dev.tsv" in error
    assert not output.exists()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that somebody asks for."""
    asked: list[Any] = []

    def refuse(*given: Any) -> None:
        asked.append(given)
        raise OSError("no network")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.mark.parametrize("name", ["nobody/nothing", "bert-base-uncased", "no/where/at all"])
def test_what_is_not_there_is_refused_without_a_network(
    name: str,
    text: Path,
    tmp_path: Path,
    no_network: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    commands = {
        "--model: expected a folder": glue(tmp_path, Path(name), out, "sst2"),
        "--model: expected a folder with": glue(tmp_path, Path(name), out, "all"),
        "--pretrained: there is no": mlm(text, out, f"--pretrained={name}"),
        "--tokenizer: there is no": mlm(text, out, f"--tokenizer={name}"),
        "--eval-data: there is no": mlm(text, out, f"--eval-data={name}"),
        "RUN: expected the --output of": ["explain", name, "--text", "a", f"--output={out}.png"],
        "has no card.json": ["predict", name, "image.png"],
        "--pretrained: cannot read": [
            *("train", "classify", f"--data={tmp_path}", f"--output={out}"),
            f"--pretrained={name}",
        ],
    }
    for message, given in commands.items():
        assert cli.main(given) == 1, message
        error = capsys.readouterr().err
        assert message in error
        assert name in error
        assert not error.rstrip().endswith(":")
    with pytest.raises(SystemExit):
        cli.main(mlm(text, out, f"--config={name}"))
    assert f"--config: cannot read {name}: No such file" in capsys.readouterr().err
    assert no_network == []


def test_folders_that_hold_something_else(
    encoder: Path,
    text: Path,
    tmp_path: Path,
    no_network: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transformers makes up a tokenizer without words for a BERT that has none."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=20, intermediate_size=8, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    SetformerModel(SetformerConfig(vocab_size=9, **SIZES)).save_pretrained(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    data, out = write_reviews(tmp_path / "glue"), tmp_path / "out"

    def error(given: list[str]) -> str:
        assert cli.main(given) == 1
        message = capsys.readouterr().err
        assert not message.rstrip().endswith(":")
        return message

    def pretrained(name: str, *more: object) -> str:
        return error(mlm(text, out, f"--pretrained={tmp_path / name}", *more))

    for name in ("bert", "bare", "empty"):
        assert f"{tmp_path / name}: " in error(glue(data, tmp_path / name, out, "sst2"))
    assert "has no tokenizer" in error(glue(data, tmp_path / "bert", out, "sst2"))
    assert "--pretrained: expected a SeTformer encoder" in pretrained("bert")
    assert f"--pretrained: {tmp_path}/bare: " in pretrained("bare")
    assert f"--pretrained: {tmp_path}/empty: " in pretrained("empty")
    other = pretrained("bare", f"--tokenizer={encoder}")
    assert "a model of 9 words, with a tokenizer of " in other
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "unmasked")
    given = mlm(text, out, f"--tokenizer={tmp_path / 'unmasked'}")
    assert "its tokenizer has no mask_token" in error(given)
    make_tokenizer().save_pretrained(tmp_path / "bert")
    assert "a model of 20 words" in error(glue(data, tmp_path / "bert", out, "sst2"))
    assert no_network == []


def test_an_error_without_words_is_named_by_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_line(FileNotFoundError()) == "FileNotFoundError"
    assert first_line(ValueError("\n")) == "ValueError"
    assert first_line(ValueError("one of: \n (1) this\nor")) == "one of: (1) this"
    path = tmp_path / "weights"
    path.touch()

    def fail(_: str) -> None:
        raise AssertionError

    monkeypatch.setattr(backbones.timm.models, "load_state_dict", fail)
    with pytest.raises(TrainingError, match=r"weights: AssertionError$"):
        backbones.load_pretrained(torch.nn.Linear(1, 1), path)


def test_pretraining_goes_on_from_an_encoder(encoder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = mlm(text, output, "--steps=1", "--lr=0", f"--pretrained={encoder}")
    assert cli.main(given) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, output))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    config = SetformerConfig.from_pretrained(output)
    assert (config.conv_kernel_size, config.hidden_size) == (3, 32)
    assert config.vocab_size == SetformerConfig.from_pretrained(encoder).vocab_size
    files = [(folder / "tokenizer.json").read_bytes() for folder in (encoder, output)]
    assert files[0] == files[1]
    dropout = mlm(text, tmp_path / "more", "--steps=1", f"--pretrained={encoder}")
    assert cli.main([*dropout, "--model-options", "hidden_dropout_prob=0.3"]) == 0
    assert SetformerConfig.from_pretrained(tmp_path / "more").hidden_dropout_prob == 0.3


def test_pretraining_takes_any_tokenizer(text: Path, tmp_path: Path) -> None:
    """Whose special tokens stand anywhere, and whose words start otherwise."""
    words = sorted({word for text, _ in reviews(99) for word in text.split()})
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<p>"}
    vocabulary = [*words, *names.values(), "<unk>"]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names)
    tokenizer.save_pretrained(tmp_path / "words")
    output = tmp_path / "run"
    given = mlm(text, output, "--steps=1", f"--tokenizer={tmp_path / 'words'}", "--model=mini")
    assert cli.main([*given, *TINY]) == 0
    config = SetformerConfig.from_pretrained(output)
    assert config.vocab_size == len(vocabulary)
    assert config.pad_token_id == vocabulary.index("<p>")
    options = argparse.Namespace(
        data=[text], eval_data=None, on_error="stop", output=output, resume=False, model="mini",
        pretrained=None, tokenizer=tmp_path / "words", model_options=[], sequence_length=16,
        mask_share=0.5,
    )  # fmt: skip
    packed = Mlm(options).train
    ids = {i for i, word in enumerate(vocabulary) if word in words}
    for index in range(len(packed)):
        tokens, labels = packed[index]
        assert {*labels.tolist()} <= ids | {-100}
        assert {*tokens.tolist()} <= {*range(len(vocabulary))} - {vocabulary.index("<unk>")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--pretrained", "--model=mini"), "--model: comes from --pretrained; leave one"),
        (("--pretrained", "--vocab-size=200"), "--vocab-size: comes from --pretrained"),
        (("--tokenizer", "--vocab-size=200"), "--vocab-size: comes from --tokenizer"),
        (("--tokenizer", "--cased"), "--cased: comes from --tokenizer"),
        (("--tokenizer", "--alphabet=9"), "--alphabet: comes from --tokenizer"),
        (("--pretrained", "--model-options", "hidden_size=64"), "are missing or of another shape"),
        (("--pretrained", "--model-options", "num_hidden_layers=2"), "are missing or of another"),
    ],
)
def test_what_comes_from_a_folder_is_not_asked_for_otherwise(
    given: tuple[str, ...],
    message: str,
    encoder: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, *more = given
    assert cli.main(mlm(text, tmp_path / "run", f"{source}={encoder}", *more)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_pretraining_from_an_encoder_resumes_to_the_same_numbers(
    encoder: Path, text: Path, tmp_path: Path
) -> None:
    length = ("--eval-every=3", "--save-every=2", "--steps=5", f"--pretrained={encoder}")
    assert launch(1, run_command, mlm(text, tmp_path / "whole", *length)) == [0]
    stopped = tmp_path / "stopped"
    assert launch(1, stop_at, 3, mlm(text, stopped, *length)) == [9]
    assert launch(1, run_command, mlm(text, stopped, *length, "--resume")) == [0]
    assert metrics(stopped)["history"] == metrics(tmp_path / "whole")["history"]
    known = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(stopped / "model.safetensors").items():
        assert torch.equal(tensor, known[name]), name


@pytest.mark.slow
def test_processes_share_a_tokenizer_and_what_is_wrong(
    encoder: Path, text: Path, tmp_path: Path
) -> None:
    common = ("--steps=1", f"--eval-data={text}", "--model=mini", *TINY)
    given = mlm(text, tmp_path / "run", f"--tokenizer={encoder}", *common)
    assert launch(2, run_command, given) == [0, 0]
    wrong = mlm(text, tmp_path / "wrong", "--vocab-size=100", "--alphabet=99", *common)
    text.write_text("".join(map(chr, range(0x4E00, 0x4F00))), encoding="utf-8")
    assert launch(2, run_command, wrong, kill_after=60) == [1, 1]
