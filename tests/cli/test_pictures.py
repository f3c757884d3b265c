"""What all pictures share: nothing is cut off, every script is readable, light or dark."""

import itertools
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from PIL import Image

from setformer_ext import cli
from setformer_ext.cli import fonts
from setformer_ext.cli.demo.data import Images
from setformer_ext.cli.demo.figure import draw_curves, draw_plans
from setformer_ext.cli.demo.model import Classifier, make_set_attention
from setformer_ext.cli.demo.train import History
from setformer_ext.cli.explain.picture import draw_references
from setformer_ext.cli.explain.sentence import draw_words
from setformer_ext.cli.predict import drawing as predictions
from setformer_ext.cli.predict.answers import Classification, Detection, Segmentation
from setformer_ext.cli.themes import THEMES, covering_references, style

LONG = "a_file_name_without_a_blank_" * 9
NAMES = [
    "W" * 80,
    "一只名字很长很长很长很长很长很长很长很长的猫",
    "a name of more words than there is room for",
    "",
    "x",
]
SIZES = [(1, 1), (9, 700), (700, 9), (90, 120)]  # width, height

# Where a font is missing, measuring outside of style() warns again.
pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *given: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(figure: Figure) -> list[Text]:
    """Those that are seen."""
    unseen: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not axes.axison or not low <= tick.get_loc() <= high:
                    unseen.update(tick.findobj(Text))
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return [text for text in found if text not in unseen]


def require_inside(figure: Figure) -> None:
    figure.draw_without_rendering()
    for text in texts(figure):
        box = text.get_window_extent()
        inside = box.x0 > -1 and box.y0 > -1
        inside &= box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1
        assert inside, (text.get_text(), box, figure.bbox)


def answers(width: int, height: int) -> list[Classification | Detection | Segmentation]:
    box = torch.tensor([[0.6 * width, 0.1 * height, width, height], [0.0, 0.0, width, height]])
    labels = torch.arange(width * height).view(height, width) % 5
    return [
        Classification(NAMES, torch.tensor([0.999, 0.001, 0.0, 0.0, 0.0])),
        Detection(NAMES, box, torch.tensor([4, 1]), torch.tensor([0.8, 0.7]), None),
        Segmentation(NAMES, labels),
        Segmentation([f"{i}{NAMES[1]}" for i in range(40)], labels * 8),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_no_text_is_cut_off_in_predictions(
    size: tuple[int, int], tmp_path: Path, drawn: list[Figure]
) -> None:
    for answer in answers(*size):
        name = f"\udcff_{LONG}"  # begins with a byte that is no text
        predictions.draw(answer, Image.new("RGB", size), name, tmp_path / "p.png")
        require_inside(drawn.pop())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_no_text_is_cut_off_over_images(
    size: tuple[int, int], tmp_path: Path, drawn: list[Figure]
) -> None:
    for references, layer in ((1, "stage 1"), (12, f"{LONG}: layer 1 {LONG}")):
        plan = torch.rand(6, references)
        draw_references(torch.rand(3, *size[::-1]), plan, (2, 3), layer, tmp_path / "p.png")
        require_inside(drawn.pop())


@pytest.mark.slow
@pytest.mark.parametrize("words", [["x"], ["[CLS]", "w" * 300, "猫"], ["antidisestablish"] * 60])
def test_no_text_is_cut_off_over_words(
    words: list[str], tmp_path: Path, drawn: list[Figure]
) -> None:
    for references, layer in ((1, "layer 1"), (1000, f"layer 1 {LONG}")):
        draw_words(words, torch.rand(len(words), references), layer, tmp_path / "p.png")
        require_inside(drawn.pop())


def test_no_text_is_cut_off_in_the_demo(tmp_path: Path, drawn: list[Figure]) -> None:
    history = History([2.0, 1.0], [2], [0.5], 1.0)
    seconds = {"SeT": [0.001, 0.002, 0.009], "softmax": [0.002, 0.03]}
    draw_curves({"SeT": history, "softmax": history}, "/home/" + LONG, seconds, tmp_path / "c.png")
    pictures, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    images = Images(pictures, labels, pictures, labels, [*NAMES[:2], "\udcff"], "here")
    draw_plans(Classifier(1, 8, 3, make_set_attention), images, tmp_path / "r.png")
    assert len(drawn) == 2
    for figure in drawn:
        require_inside(figure)


# Fonts


def chosen_characters(families: list[str]) -> set[int]:
    files = {findfont(FontProperties(family=[family])) for family in families}
    return set().union(*(get_font(file).get_charmap() for file in files))


def test_a_font_is_found_for_what_the_usual_one_lacks() -> None:
    """By one of those that matplotlib brings; the same way finds fonts for Chinese."""
    usual, stix = (chosen_characters([name]) for name in ("DejaVu Sans", "STIXGeneral"))
    lacking = [chr(code) for code in sorted(stix - usual) if chr(code).isprintable()][:5]
    assert lacking
    families = fonts.families(["plain", *lacking])
    assert families[:1] == fonts.families(["plain"])
    assert {ord(c) for c in lacking} <= chosen_characters(families)


def write(text: str, background: str = "dark") -> None:
    with style(background, [text]):
        figure = Figure()
        figure.suptitle(text)
        figure.draw_without_rendering()


def test_scripts_without_a_font_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fonts, "_installed", dict)
    fonts._tell_of_boxes.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write("plain\n\t\u200d")
        assert capsys.readouterr().err == ""
        for _ in range(3):
            write("\U0001f995 中文, $x_")
    assert capsys.readouterr().err.count("boxes stand for characters") == 1


def test_chinese_needs_no_boxes_where_a_font_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Also a font that was installed after matplotlib made its list."""
    found = subprocess.run(
        ["fc-list", ":lang=zh", "file"], capture_output=True, text=True, check=False
    )
    if not found.stdout.strip():
        pytest.skip("no font for Chinese is installed")
    fonts._tell_of_boxes.cache_clear()
    families = fonts.families(["中文"])
    assert {ord(c) for c in "中文"} <= chosen_characters(families)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["a few words of a title", "猫" * 90, "W" * 90, "a\nb" * 20, ""])
def test_lines_have_the_width_that_is_asked_for(text: str) -> None:
    with style("dark", [text]):
        lines = fonts.wrapped(text, 12, 2.0)
        assert fonts.width(lines, 12) <= 2.0
        assert "".join(lines.split()) == "".join(text.split())
        short = fonts.shortened(text, 12, 0.5)
        assert fonts.width(short, 12) <= 0.5
        assert short == text or (short.endswith("…") and text.startswith(short[:-1]))
        assert fonts.shortened(text, 12, 1e6) == text


# Themes


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("name", THEMES)
def test_themes_are_readable(name: str) -> None:
    theme = THEMES[name]
    assert len(set(theme.colours)) == len(theme.colours) == 8
    for colour in (theme.text, *theme.colours):
        lighter, darker = sorted((luminance(colour), luminance(theme.background)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 3, colour


@pytest.mark.slow
@pytest.mark.parametrize(("background", "level"), [("dark", 0), ("light", 255)])
def test_pictures_have_the_background(background: str, level: int, tmp_path: Path) -> None:
    image = torch.full((3, 20, 30), 0.5)
    plan = torch.eye(6) / 6
    pictures: list[Callable[[Path], None]] = [
        lambda path: draw_references(image, plan, (2, 3), "x", path, background=background),
        lambda path: draw_words(list("abcdef"), plan, "x", path, background),
        *(
            lambda path, answer=answer: predictions.draw(
                answer, Image.new("RGB", (90, 60), "grey"), "x", path, background
            )
            for answer in answers(90, 60)
        ),
    ]
    for picture in pictures:
        picture(tmp_path / "p.png")
        pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
        edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
        assert (edge == level).all()
        assert (pixels == 255 - level).all(-1).any()  # the text


# Which references


def covered(plan: np.ndarray, references: tuple[int, ...]) -> float:
    return (plan / plan.sum(0))[:, references].max(1).sum()


def test_references_cover_the_tokens_instead_of_repeating_one(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    """Twelve of large mass draw from the first token; each other token has one of small mass."""
    plan = torch.full((8, 19), 1e-3)
    plan[0, :12] = torch.linspace(1, 2, 12)
    plan[torch.arange(1, 8), torch.arange(12, 19)] = 0.1
    chosen = covering_references(plan, 8)
    assert chosen[0] == 11
    assert sorted(chosen[1:]) == list(range(12, 19))
    draw_words(list("abcdefgh"), plan, "layer", tmp_path / "w.png")
    draw_references(torch.rand(3, 9, 9), plan, (2, 4), "layer", tmp_path / "r.png")
    expected = [str(j + 1) for j in chosen]
    rows = [axes.get_yticklabels()[0].get_text() for axes in drawn[0].axes]
    assert [row.split(":")[0] for row in rows] == expected
    titles = [axes.get_title() for axes in drawn[1].axes[2:]]
    assert [title.split(":")[0].removeprefix("reference ") for title in titles] == expected


def test_references_are_chosen_almost_as_well_as_can_be() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        plan = generator.random((6, 9)) ** 8
        chosen = covering_references(torch.tensor(plan), 4)
        assert len(set(chosen)) == 4
        best = max(covered(plan, subset) for subset in itertools.combinations(range(9), 4))
        assert covered(plan, tuple(chosen)) > (1 - 1 / np.e) * best
    assert sorted(covering_references(torch.tensor(plan), 99)) == list(range(9))
    assert len(set(covering_references(torch.full((3, 5), 0.1), 4))) == 4  # all alike


# Options


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("explain", ["run", "--stage", "3", "photo.jpg"]),
        ("explain", ["--block", "-1", "run", "--background", "light", "photo.jpg"]),
        ("predict", ["run", "photo.jpg", "--threshold", "0.3", "other.jpg"]),
    ],
)
def test_options_may_stand_between_files(
    command: str, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(f"setformer_ext.cli.{command}", fromlist=["run"])
    taken = []
    monkeypatch.setattr(module, "run", taken.append)
    assert cli.main([command, *given]) == 0
    (options,) = taken
    images = options.image if command == "explain" else options.images
    expected = [Path(x) for x in given if x.endswith("jpg")]
    assert options.training == Path("run")
    assert images == (expected if command == "predict" else expected[0])


def test_background_is_one_of_the_themes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["predict", "run", "photo.jpg", "--background", "pink"])
    assert "invalid choice: 'pink'" in capsys.readouterr().err
