"""The backbone, and all that timm asks of it."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode

from setformer_ext import SetAttention
from setformer_ext.controls import ATTENTIONS
from setformer_ext.vision import Setformer
from setformer_ext.vision.models import SIZES

STATE_DICT = Path(__file__).parent / "data" / "setformer_tiny_state_dict.txt"
SMALL = {
    "dims": (32, 32, 64, 64),
    "depths": (1, 1, 2, 1),
    "num_references": (4, 4, 4, 4),
    "num_classes": 7,
}
STRIDES = (4, 8, 16, 32)


def make(seed: int = 0, **options: object) -> Setformer:
    torch.manual_seed(seed)
    return timm.create_model("setformer_mini", **{**SMALL, **options}).eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_registered(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    config = model.pretrained_cfg
    assert config["first_conv"] == "stem.first.conv"
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    assert model.get_submodule(config["classifier"]).out_features == config["num_classes"] == 1000
    assert not config["fixed_input_size"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config))
    resize, crop = transform.transforms[:2]
    assert resize.size == math.floor(224 / 0.9)
    assert resize.interpolation == InterpolationMode.BICUBIC
    assert crop.size == (224, 224)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_what_their_docstrings_say(name: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name)
        model(torch.empty(1, 3, 224, 224))
    parameters = sum(p.numel() for p in model.parameters())
    counted = f"{parameters / 1e6:.1f}", f"{counter.get_total_flops() / 2e9:.1f}"
    said = re.findall(r"[\d.]+(?= million| billion)", timm.model_entrypoint(name).__doc__)
    assert tuple(said) == counted


def test_state_dict_keys_are_stable() -> None:
    """Weights that people have saved must load: change the keys only with a way to convert them."""
    with torch.device("meta"):
        state = timm.create_model("setformer_tiny").state_dict()
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in state.items()]
    assert lines == STATE_DICT.read_text().splitlines()


@pytest.mark.parametrize("global_pool", ["avg", "max"])
def test_is_the_network_on_its_own_weights(global_pool: str) -> None:
    """All of it written out, but for attention, whose module has such a test of its own."""
    model = make(global_pool=global_pool).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # of norms in eval mode, the buffers
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))

    def norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:  # [B, C, H, W]
        mean, variance, weight, bias = (
            statistic.view(-1, 1, 1)
            for statistic in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        return weight * (x - mean) / (variance + 1e-5).sqrt() + bias

    def halved(x: Tensor, layer: nn.Module) -> Tensor:
        return norm(F.conv2d(x, layer.conv.weight, stride=2, padding=1), layer.norm)

    batch = images(2, 3, 45, 70).double()
    x = halved(F.gelu(halved(batch, model.stem.first)), model.stem.second)
    for i, stage in enumerate(model.stages):
        if i > 0:
            x = halved(x, stage.downsample)
        for block in stage.blocks:
            tokens = norm(x, block.attention_norm).flatten(2).mT
            attended = block.attention(tokens, grid=x.shape[2:])
            x = x + attended.mT.reshape(x.shape)
            mlp = block.mlp
            hidden = torch.einsum("bchw,kc->bkhw", x, mlp.expand.weight)
            hidden = F.gelu(norm(hidden, mlp.expand_norm))
            hidden = F.conv2d(hidden, mlp.conv.weight, padding=1, groups=hidden.shape[1])
            hidden = F.gelu(norm(hidden, mlp.conv_norm))
            x = x + torch.einsum("bkhw,ck->bchw", hidden, mlp.reduce.weight)
            x = x + mlp.reduce.bias.view(-1, 1, 1)
    x = norm(x, model.norm)
    pooled = x.mean((2, 3)) if global_pool == "avg" else x.amax((2, 3))
    expected = F.linear(pooled, model.head.fc.weight, model.head.fc.bias)
    torch.testing.assert_close(model(batch), expected)


def test_weights_start_at_the_size_of_their_part() -> None:
    """Of a convolution where C channels see each of the input's by 3 x 3 pixels sqrt(2 / (9 C)), by
    which gradients keep their size (He et al., 2015); linear layers are small."""
    for name, module in make().named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if ".attention." in name and not name.endswith("projection"):
            continue
        expected = 0.02
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (9 * module.out_channels / module.groups))
        # The deviation of n numbers is known to 1 / sqrt(2 n) of itself; five times that is rare.
        error = module.weight.std().item() / expected - 1
        assert abs(error) < 5 / math.sqrt(2 * module.weight.numel()), name
        assert module.bias is None or (module.bias == 0).all(), name


@pytest.mark.parametrize("size", [(1, 1), (33, 97), (224, 1), (64, 64), (511, 300)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = make()
    features = model.forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, dim, feature in zip(STRIDES, SMALL["dims"], features, strict=True):
        assert feature.shape == (2, dim, *(math.ceil(side / stride) for side in size))
        assert feature.isfinite().all()
    assert model(images(2, 3, *size)).shape == (2, 7)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_images_do_not_see_one_another(attention: str) -> None:
    model, batch = make(attention=attention).double(), images(3, 3, 40, 56).double()
    alone = torch.cat([model(image.unsqueeze(0)) for image in batch])
    torch.testing.assert_close(model(batch), alone)


def test_memory_format_does_not_matter() -> None:
    model, batch = make().double(), images(2, 3, 64, 64).double()
    channels_last = batch.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(channels_last), model(batch))


def test_attention_is_a_choice() -> None:
    attentions = {
        kind: sum(isinstance(m, SetAttention) for m in make(attention=kind).modules())
        for kind in ATTENTIONS
    }
    assert attentions == {"set": 5, "softmax": 0, "mean": 0, "none": 0}
    options = {"iterations": 7, "position_bandwidth": None}
    block = make(attention_options=options).stages[1].blocks[0]
    assert (block.attention.iterations, block.attention.position_bandwidth) == (7, None)
    assert block.attention.epsilon == 0.04  # the others stay


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels: int) -> None:
    assert make(in_chans=channels)(images(2, channels, 32, 32)).shape == (2, 7)


def test_without_classifier() -> None:
    model, whole, batch = make(num_classes=0), make(), images(2, 3, 64, 64)
    features = model.forward_features(batch)
    torch.testing.assert_close(model(batch), features.mean((2, 3)))
    torch.testing.assert_close(whole.forward_head(features, pre_logits=True), model(batch))


def test_dropout_before_the_classes() -> None:
    model, batch = make(drop_rate=0.25), images(2, 3, 64, 64)
    model.head.train()
    pooled = model.forward_features(batch).mean((2, 3))
    torch.manual_seed(2)
    expected = model.get_classifier()(F.dropout(pooled, 0.25))
    torch.manual_seed(2)
    torch.testing.assert_close(model(batch), expected)


def test_new_classifier() -> None:
    model = make()
    model.reset_classifier(3)
    assert model(images(2, 3, 32, 32)).shape == (2, 3)
    assert model.get_classifier().weight.std() < 0.03
    model.reset_classifier(0, "")
    assert model(images(2, 3, 64, 64)).shape == (2, 64, 2, 2)


@pytest.mark.parametrize("getter", [None, "getter"])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (1, 3), (2,)])
def test_features_only(getter: str | None, wanted: tuple[int, ...]) -> None:
    options = {} if getter is None else {"feature_cls": getter}
    model = make(features_only=True, out_indices=wanted, num_classes=0, **options)
    whole = make()
    renamed = {name.replace("stages.", "stages_"): x for name, x in whole.state_dict().items()}
    state = {f"model.{name}": x for name, x in whole.state_dict().items()} if getter else renamed
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not missing
    features = model(images(1, 3, 97, 130))
    expected = whole.forward_intermediates(images(1, 3, 97, 130), intermediates_only=True)
    assert model.feature_info.channels() == [SMALL["dims"][i] for i in wanted]
    assert model.feature_info.reduction() == [STRIDES[i] for i in wanted]
    for feature, i in zip(features, wanted, strict=True):
        torch.testing.assert_close(feature, expected[i])


def test_intermediates() -> None:
    model, batch = make(), images(1, 3, 64, 64)
    final, all_of_them = model.forward_intermediates(batch)
    torch.testing.assert_close(final, model.forward_features(batch))
    last = model.forward_intermediates(batch, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last, [final])
    early, some = model.forward_intermediates(batch, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(some, all_of_them[:2])
    torch.testing.assert_close(early, all_of_them[1])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(batch, output_fmt="NLC")


def test_pruning() -> None:
    model, batch = make(), images(1, 3, 64, 64)
    expected = model.forward_intermediates(batch, indices=[1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2
    assert model.num_features == 32
    torch.testing.assert_close(model(batch), expected[0])


def test_stochastic_depth_grows_with_depth() -> None:
    model = make(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(rates, [0.0, 0.1, 0.2, 0.3, 0.4])
    batch = images(2, 3, 64, 64)
    torch.testing.assert_close(model(batch), make()(batch))
    assert not torch.equal(model.train()(batch), model(batch))


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    """And no running statistics: a batch counts once, though it is passed through twice."""
    gradients, statistics, kept = [], [], []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        sizes: list[int] = []

        def keep(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(images(2, 3, 64, 64)).square().sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        statistics.append(list(model.buffers()))
        kept.append(sum(sizes))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(statistics[0], statistics[1])
    assert 0 < kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("getter", [None, "getter"])
def test_gradient_checkpointing_of_features(getter: str | None) -> None:
    options = {} if getter is None else {"feature_cls": getter}
    gradients = []
    for enable in (False, True):
        model = make(features_only=True, num_classes=0, **options).train()
        (model.model if getter else model).set_grad_checkpointing(enable)
        sum(feature.square().sum() for feature in model(images(1, 3, 64, 64))).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("through_factory", [False, True])
def test_layer_decay_groups(through_factory: bool) -> None:
    model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if through_factory:
        optimizer = create_optimizer_v2(model, "adamw", 1e-3, 0.05, layer_decay=0.5)
        groups = optimizer.param_groups
    else:
        groups = param_groups_layer_decay(
            model, 0.05, model.no_weight_decay(), layer_decay=0.5, verbose=False
        )
    free = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {name for name in names.values() if name.endswith(".reference")} < free
    assert not any(name.endswith("mlp.expand.weight") for name in free)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(scales) == len(names)
    assert scales["head.fc.weight"] == 1
    assert (
        scales["stem.first.conv.weight"] == scales["stem.second.norm.bias"] == min(scales.values())
    )
    blocks = [f"stages.{s}.blocks.{b}" for s, n in enumerate(SMALL["depths"]) for b in range(n)]
    of_blocks = [scales[f"{block}.mlp.expand.weight"] for block in blocks]
    assert of_blocks == sorted(set(of_blocks))
    assert scales["stem.first.conv.weight"] < of_blocks[0]
    assert of_blocks[-1] < 1
    assert scales["norm.weight"] == of_blocks[-1]
    assert scales["stages.2.downsample.conv.weight"] == of_blocks[blocks.index("stages.2.blocks.0")]
    for block, scale in zip(blocks, of_blocks, strict=True):
        assert {v for name, v in scales.items() if name.startswith(block)} == {scale}


def test_what_does_not_decay() -> None:
    model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    free = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    block = "stages.2.blocks.1."
    attention = f"{block}attention."
    assert {f"{attention}{name}" for name in ("reference", "reference_log_mass")} < free
    assert f"{attention}key.weight" not in free
    assert f"{block}mlp.expand.weight" not in free
    assert {name for name in names.values() if name.endswith("bias")} < free


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_checkpoint_path(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    model, path = make(seed=3), tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    loaded = make(seed=4, checkpoint_path=str(path))
    torch.testing.assert_close(loaded(images(1, 3, 32, 32)), model(images(1, 3, 32, 32)))


def test_fine_tuning_from_a_file(tmp_path: Path) -> None:
    """timm drops the classifier and sums the first convolution over colours, as the config says."""
    model, path = make(seed=3), tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 7}
    tuned = make(seed=4, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1)
    grey = images(1, 1, 32, 32)
    assert tuned(grey).shape == (1, 3)
    torch.testing.assert_close(
        tuned.forward_features(grey), model.forward_features(grey.expand(-1, 3, -1, -1))
    )


def test_no_weights_are_published() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for setformer_mini"):
        timm.create_model("setformer_mini", pretrained=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dims", (32, 64, 96)),
        ("dims", (32, 48, 64, 96)),
        ("dims", 64),
        ("depths", (1, 0, 1, 1)),
        ("num_references", (4, 4, 4)),
        ("attention", "linear"),
        ("in_chans", 0),
        ("num_classes", -1),
        ("mlp_ratio", 0),
        ("drop_rate", 1.5),
        ("drop_path_rate", 1.5),
    ],
)
def test_bad_arguments_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"Setformer: {option} must be .*, got "):
        make(**{option: value})


@pytest.mark.parametrize("attention", ["softmax", "mean", "none"])
def test_other_attentions_take_no_options_of_set_attention(attention: str) -> None:
    with pytest.raises(ValueError, match=r"attention_options must be None, got \{'epsilon': 0.1\}"):
        make(attention=attention, attention_options={"epsilon": 0.1})


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 0, 32)])
def test_bad_images_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] with H, W >= 1, got \["):
        make()(images(*shape))


@pytest.mark.slow
def test_learns_two_classes() -> None:
    """Stripes along the one or the other side, which no mean of the image tells apart."""
    model = make(num_classes=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    stripes = ((torch.arange(32) // 4) % 2).float().expand(3, 32, 32)
    losses = []
    for _ in range(30):
        labels = torch.randint(2, (16,), generator=generator)
        batch = torch.stack([stripes if label else stripes.mT for label in labels])
        batch = batch + 0.5 * torch.randn(batch.shape, generator=generator)
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.2 < math.log(2) < losses[0] + 0.3
