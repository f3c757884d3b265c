"""What a training does, by hand: rates, averages, norms and losses against their formulas.

Two runs that are compared with one another share what is wrong with both.
"""

import argparse
import copy
import math
import re
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import setformer_ext.vision  # noqa: F401 (registers the models)
from setformer_ext import SetAttention
from setformer_ext.cli.train.learner import Learner

OPTIONS = {
    "shard": False,
    "seed": 0,
    "gradient_checkpointing": False,
    "ema_decay": 0.0,
    "lr": 0.02,
    "weight_decay": 0.3,
    "layer_decay": 1.0,
    "warmup": 0.25,
    "clip_grad": 0.0,
    "accumulate": 1,
}
STEPS = 40


class Line:
    """A network of one weight matrix and a bias, whose loss a batch gives: <batch, output>."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))

    def losses(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (model(batch) * torch.tensor([1.0, -2.0])).sum()}


def make_learner(task: Any = None, **options: Any) -> Learner:
    given = argparse.Namespace(**OPTIONS | options)
    return Learner(task or Line(), given, Accelerator(cpu=True), STEPS)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine() -> None:
    learner, warm = make_learner(), 10  # a quarter of 40 steps
    for step in range(warm):
        assert learner.lr_of(step) == pytest.approx(0.02 * (1 + step * (warm - 1) / warm) / warm)
    for step in (warm, warm + 1, 25, STEPS - 1):
        expected = 0.02 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        assert learner.lr_of(step) == pytest.approx(expected)
    assert make_learner(warmup=0.0).lr_of(0) == pytest.approx(0.02)


def test_a_step_is_taken_at_the_rate_of_its_number() -> None:
    """AdamW's first step moves each weight by the rate, and shrinks what decays."""
    learner = make_learner(weight_decay=0.3)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.backward(batch(), last=True)
    gradients = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    learner.step(20)
    rate = 0.02 * 0.5 * (1 + math.cos(math.pi * 20 / STEPS))
    for name, parameter in learner.model.named_parameters():
        shrunk = before[name] * (1 - rate * 0.3 * (name == "0.weight"))
        moved = gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(parameter, shrunk - rate * moved)
        assert parameter.grad is None or (parameter.grad == 0).all()


class Layered(nn.Sequential):
    """Three layers, as timm is told of those of a backbone."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^0\.", "blocks": r"^(\d)\."}


class OfLayers(Line):
    def make_model(self) -> nn.Module:
        return Layered()


@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_two_steps_are_adamws_each_layer_at_its_rate(layer_decay: float) -> None:
    """With Kingma and Ba's means of gradients, of rates 0.9 and 0.999."""
    learner = make_learner(OfLayers(), layer_decay=layer_decay)
    names = {id(p): name for name, p in learner.model.named_parameters()}
    scales = {
        names[id(p)]: group["lr_scale"]
        for group in learner.optimizer.param_groups
        for p in group["params"]
    }
    expected = {name: p.detach().double() for name, p in learner.model.named_parameters()}
    assert scales == {name: layer_decay ** (2 - int(name[0])) for name in expected}  # layers above
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for step, number in enumerate((20, 25), start=1):
        learner.backward(batch(number), last=True)
        rate = 0.02 * 0.5 * (1 + math.cos(math.pi * number / STEPS))
        for name, parameter in learner.model.named_parameters():
            gradient, own = parameter.grad.double(), rate * scales[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            size = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            moved = first[name] / (1 - 0.9**step) / size
            kept = expected[name] * (1 - own * 0.3 * name.endswith("weight"))
            expected[name] = kept - own * moved
        learner.step(number)
        for name, parameter in learner.model.named_parameters():
            torch.testing.assert_close(parameter, expected[name].float(), msg=f"{step}, {name}")


class OfBlocks(Line):
    depths = (1, 1, 2, 1)

    def make_model(self) -> nn.Module:
        sizes = {"dims": (32,) * 4, "depths": self.depths, "num_references": (4,) * 4}
        return timm.create_model("setformer_mini", num_classes=2, **sizes)


@pytest.mark.parametrize("again", [False, True])
def test_gradient_checkpointing_runs_each_block_anew_in_backward(again: bool) -> None:
    learner = make_learner(OfBlocks(), gradient_checkpointing=again)
    calls: list[str] = []
    for name, module in learner.model.named_modules():
        if re.fullmatch(r"stages\.\d\.blocks\.\d", name):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    learner.backward(torch.randn(2, 3, 32, 32), last=True)
    for stage, depth in enumerate(OfBlocks.depths):
        for block in range(depth):
            assert calls.count(f"stages.{stage}.blocks.{block}") == 1 + again


def test_averaged_weights_are_the_moving_average_of_each_step() -> None:
    learner = make_learner(ema_decay=0.6)
    average = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    for step in range(6):
        learner.backward(batch(step), last=True)
        learner.step(step)
        # timm's: 1 - (1 + k)^(-2/3) after k updates, up to the decay that was asked for.
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))
        for name, parameter in learner.model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        for name, parameter in learner.evaluated().named_parameters():
            torch.testing.assert_close(parameter, average[name], msg=f"step {step}, {name}")


def _gradient_at_the_step(learner: Learner, number: int) -> dict[str, Tensor]:
    """The gradients that the optimizer sees."""
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in learner.model.named_parameters()})

    handle = learner.optimizer.register_step_pre_hook(look)
    learner.step(number)
    handle.remove()
    return seen


@pytest.mark.parametrize("largest", [0.0, 0.5, 1000.0])
def test_gradients_are_clipped_to_the_norm_of_all_together(largest: float) -> None:
    learner = make_learner(clip_grad=largest)
    learner.backward(batch(), last=True)
    whole = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert 0.5 < norm < 1000
    seen = _gradient_at_the_step(learner, 0)
    scale = largest / norm if largest == 0.5 else 1.0
    for name, gradient in whole.items():
        torch.testing.assert_close(seen[name], scale * gradient)


def test_accumulated_gradients_are_the_mean_of_the_passes() -> None:
    learner = make_learner(accumulate=3)
    passes = [batch(seed) for seed in range(3)]
    for index, each in enumerate(passes):
        learner.backward(each, last=index == 2)
    model = learner.model
    loss = sum(Line().losses(model, each)["loss"] for each in passes) / 3
    expected = torch.autograd.grad(loss, list(model.parameters()))
    seen = _gradient_at_the_step(learner, 0)
    for gradient, wanted in zip(seen.values(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


class Attending(Line):
    """With a module that exempts parameters of its own."""

    def make_model(self) -> nn.Module:
        return nn.ModuleDict({"attention": SetAttention(8, 2, 3), "head": nn.Linear(8, 2)})


def test_the_optimizer_decays_matrices_and_nothing_else() -> None:
    learner = make_learner(Attending())
    names = {id(p): name for name, p in learner.model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in learner.optimizer.param_groups
        for p in group["params"]
    }
    assert decay.keys() == set(names.values())
    matrices = {
        f"attention.{name}.weight" for name in ("key", "query", "value", "projection", "token_mass")
    }
    matrices |= {"head.weight"}
    assert {name for name, value in decay.items() if value == 0.3} == matrices
    assert {value for name, value in decay.items() if name not in matrices} == {0.0}


def test_weights_of_another_training_go_on_as_they_would_have() -> None:
    """State and averages come back whole: what was saved after two steps takes the third alike."""
    one, other = make_learner(ema_decay=0.9), make_learner(ema_decay=0.9)
    for step in range(2):
        one.backward(batch(step), last=True)
        one.step(step)
    other.load_state(copy.deepcopy(one.state()))  # as a file would give it
    for learner in (one, other):
        learner.backward(batch(2), last=True)
        learner.step(2)
    for of in (lambda x: x.model, lambda x: x.evaluated()):
        for a, b in zip(of(one).parameters(), of(other).parameters(), strict=True):
            assert torch.equal(a, b)
    initial = make_learner().model
    assert not torch.equal(one.model[0].weight, initial[0].weight)


def _smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Of Szegedy et al.: a share of the truth is spread over all classes."""
    classes = logits.shape[-1]
    truth = F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    return -(truth * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_classes_is_the_smoothed_cross_entropy(smoothing: float) -> None:
    from setformer_ext.cli.train.classify import Classify

    task = Classify.__new__(Classify)
    task.mixup, task.options = None, argparse.Namespace(label_smoothing=smoothing)
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    found = task.losses(nn.Identity(), (logits, labels))
    assert found.keys() == {"cross_entropy"}
    torch.testing.assert_close(found["cross_entropy"], _smoothed(logits, labels, smoothing))


def test_loss_of_segments_is_the_mean_over_the_pixels_that_have_a_class() -> None:
    from setformer_ext.cli.train import segment

    task = segment.Segment.__new__(segment.Segment)
    task.options = argparse.Namespace(dice=0.0)
    logits, classes = torch.randn(2, 4, 3, 5), torch.randint(4, (2, 3, 5))
    classes[0, :, 2] = segment.IGNORED
    batch = ([*logits], [*classes])
    found = task.losses(nn.Identity(), batch)["cross_entropy"]
    pixels = logits.permute(0, 2, 3, 1)[classes != segment.IGNORED]
    wanted = _smoothed(pixels, classes[classes != segment.IGNORED], 0.0)
    torch.testing.assert_close(found, wanted)
    nothing = torch.full_like(classes, segment.IGNORED)
    assert task.losses(nn.Identity(), ([*logits], [*nothing]))["cross_entropy"] == 0


def _encoder(kind: Any, **options: Any) -> Any:
    from setformer_ext.language import SetformerConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = SetformerConfig(**sizes, num_references=3, intermediate_size=8, **options)
    return kind(config).eval()


@pytest.mark.parametrize("sparse", [False, True])
def test_loss_of_masked_words_is_the_mean_over_those_that_are_asked_for(sparse: bool) -> None:
    from setformer_ext.cli.train.mlm import Mlm, Prediction
    from setformer_ext.language import SetformerForMaskedLM

    model = _encoder(SetformerForMaskedLM, sparse_prediction=sparse)
    tokens, labels = torch.randint(5, 20, (3, 7)), torch.full((3, 7), -100)
    labels[0, 2], labels[0, 5], labels[2, 1] = 7, 9, 4
    logits = model(tokens).logits
    asked = labels != -100
    expected = _smoothed(logits[asked], labels[asked], 0.0)
    task = Mlm.__new__(Mlm)
    found = task.losses(model, (tokens, labels))
    torch.testing.assert_close(found, {"cross_entropy": expected})
    if not sparse:
        return  # training always is
    # Measured in batches of different numbers of words, as one.
    measured = Prediction()
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3)):
        measured.update(model, (tokens[rows], labels[rows]))
    figures = measured.compute()
    assert figures["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)
    right = (logits[asked].argmax(-1) == labels[asked]).float().mean()
    assert figures["accuracy"] == pytest.approx(right.item())


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_loss_of_texts_is_cross_entropy_or_the_squared_error(name: str) -> None:
    from setformer_ext.cli.train.glue import Glue, Scores
    from setformer_ext.cli.train.glue_data import TASKS
    from setformer_ext.language import SetformerForSequenceClassification

    glue = TASKS[name]
    model = _encoder(
        SetformerForSequenceClassification,
        num_labels=max(1, len(glue.classes)),
        problem_type=None if glue.classes else "regression",
    )
    inputs = {"input_ids": torch.randint(5, 20, (5, 6)), "attention_mask": torch.ones(5, 6)}
    labels = torch.tensor([0, 1, 1, 0, 1]) if glue.classes else torch.randn(5) + 2
    logits = model(**inputs).logits
    if glue.classes:
        expected = _smoothed(logits, labels, 0.0)
    else:
        expected = (logits[:, 0] - labels).square().mean()
    task = Glue.__new__(Glue)
    found = task.losses(model, (inputs, labels, [""] * 5))
    torch.testing.assert_close(found, {"loss": expected})
    # Measured in batches of different sizes, as one.
    scores = Scores(glue)
    for rows in (slice(0, 4), slice(4, 5)):
        part = {key: value[rows] for key, value in inputs.items()}
        scores.update(model, (part, labels[rows], [""] * len(labels[rows])))
    assert scores.compute()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_loss_of_an_evaluation_is_that_of_all_images() -> None:
    from setformer_ext.cli.train.classify import Accuracy

    logits, labels = torch.randn(7, 6), torch.randint(6, (7,))
    measured = Accuracy(6)
    for rows in (slice(0, 4), slice(4, 7)):
        measured.update(nn.Identity(), (logits[rows], labels[rows]))
    figures = measured.compute()
    assert figures["eval_loss"] == pytest.approx(_smoothed(logits, labels, 0.0).item(), rel=1e-5)
    order = logits.argsort(-1, descending=True)
    for name, count in (("top1", 1), ("top5", 5)):
        right = (order[:, :count] == labels[:, None]).any(-1).float().mean().item()
        assert figures[name] == pytest.approx(right)
