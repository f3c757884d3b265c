"""Faults in prediction and export."""

from __future__ import annotations

from ..seeding import Seeded as Fault

PREDICT = (
    Fault(
        "labels of a segmentation written from 0 on whatever the training's",
        "cli/predict/predictors.py",
        "Segmentation(self.classes, labels, self.labels.first)",
        "Segmentation(self.classes, labels)",
    ),
    Fault(
        "the least sure object covers the others",
        "cli/predict/answers.py",
        "for number in range(len(self.masks), 0, -1):",
        "for number in range(1, len(self.masks) + 1):",
    ),
    Fault(
        "pictures of images of one name overwrite each other",
        "cli/predict/on_images.py",
        "    taken.update(path.resolve() for path in paths)\n",
        "",
    ),
    Fault(
        "an export whose answers are NaN passes its check",
        "cli/export.py",
        "if not difference <= allowed:",
        "if difference > allowed:",
    ),
    Fault(
        "broken samples are left out without being asked to",
        "cli/evaluate.py",
        '        default="stop",\n',
        '        default="skip",\n',
    ),
    Fault(
        "images that failed do not show in the exit status",
        "cli/predict/__init__.py",
        "    if failed:\n        raise UserError(failed)\n",
        "    if failed:\n        print(failed)\n",
    ),
    Fault(
        "numbers for GLUE's server outside of its range",
        "cli/predict/submission.py",
        "logits[:, 0].clamp(0, 5).tolist()",
        "logits[:, 0].tolist()",
    ),
    Fault(
        "images without objects are missing from the table",
        "cli/predict/answers.py",
        "for part in parts or [{}]:",
        "for part in parts:",
    ),
    Fault(
        "legend of objects with the colours of other classes",
        "cli/predict/drawing.py",
        "_legend(figure, names, [colours[label] for label, _ in counts])",
        "_legend(figure, names, [*colours.values()])",
    ),
    Fault(
        "second mask is filled with the second choice for the first",
        "cli/predict/texts.py",
        "tokens.masked_scatter(masked, top.indices[:, 0])",
        "tokens.masked_scatter(masked, top.indices[0])",
    ),
    Fault(
        "texts after the first are not checked",
        "cli/predict/texts.py",
        "[predictor.check(tuple(texts)) for texts in given]",
        "[predictor.check(tuple(given[0]))] * len(given)",
    ),
    Fault(
        "masks in JSON are transposed",
        "cli/predict/answers.py",
        "np.asfortranarray(mask.to(torch.uint8).numpy())",
        "np.asfortranarray(mask.to(torch.uint8).numpy().T)",
    ),
    Fault(
        "checkpoint's last weights are taken, not their moving average",
        "cli/predict/loading.py",
        "timm.models.load_state_dict(str(path))",
        "timm.models.load_state_dict(str(path), use_ema=False)",
    ),
    Fault(
        "exported head that is off passes where another may be off by more",
        "cli/predict/networks.py",
        "return next((pair for pair in pairs if not pair[0] <= pair[1]), max(pairs))",
        "return max(pairs)",
    ),
    Fault(
        "evaluation ignores the precision",
        "cli/evaluate.py",
        "make_accelerator(options.precision)",
        'make_accelerator("no")',
    ),
    Fault(
        "images to predict segments of keep their size",
        "cli/predict/predictors.py",
        'self.short_side, self.window = card["short_side"], card["window"]',
        'self.short_side, self.window = 0, card["window"]',
    ),
    Fault(
        "pictures that are drawn smaller alias",
        "cli/themes.py",
        'antialias=mode == "bicubic"',
        "antialias=False",
    ),
    Fault(
        "answers of a batch in another order",
        "cli/predict/submission.py",
        "questions[first : first + BATCH]])",
        "questions[first : first + BATCH]][::-1])",
    ),
    Fault(
        "boxes drawn with their lower right corners as widths and heights",
        "cli/predict/drawing.py",
        "Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False",
        "Rectangle((x0, y0), x1, y1, fill=False",
    ),
    Fault(
        "all but the object is coloured",
        "cli/predict/drawing.py",
        "picture[mask] = 0.5 * picture[mask] +",
        "picture[~mask] = 0.5 * picture[~mask] +",
    ),
    Fault(
        "objects have the name of the class before theirs",
        "cli/predict/drawing.py",
        'text = f"{_short(answer.classes[label])} {score:.0%}"',
        'text = f"{_short(answer.classes[label - 1])} {score:.0%}"',
    ),
    Fault(
        "bars with the names of other classes beside them",
        "cli/predict/drawing.py",
        "[_short(name) for name in answer.classes], fontsize=12)",
        "[_short(name) for name in answer.classes[::-1]], fontsize=12)",
    ),
    Fault(
        "--background of predict is ignored",
        "cli/predict/on_images.py",
        "draw(answer, image, path.name, picture, options.background)",
        "draw(answer, image, path.name, picture)",
    ),
    Fault(
        "exports pass that are off by 50 times what is allowed",
        "cli/predict/networks.py",
        "TOLERANCE = 1e-4",
        "TOLERANCE = 5e-3",
    ),
)
