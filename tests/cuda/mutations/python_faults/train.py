"""Faults in training."""

from __future__ import annotations

from ..seeding import Seeded as Fault

TRAIN = (
    Fault(
        "moving average not restored on resume",
        "cli/train/learner.py",
        "        if self.ema is not None:\n"
        '            set_model_state_dict(self.averaged, state["ema"], options=parallel.WHOLE)\n',
        "",
    ),
    Fault(
        "training goes on in eval mode after an evaluation",
        "cli/train/loop.py",
        "        self.learner.model.train()\n",
        "",
    ),
    Fault(
        "every epoch in the same order",
        "cli/train/sampling.py",
        "np.random.default_rng((self.seed, ORDER, epoch))",
        "np.random.default_rng((self.seed, ORDER))",
    ),
    Fault(
        "parameters that modules exempt decay",
        "cli/train/optimization.py",
        'p.ndim > 1 and not name.endswith(".bias") and id(p) not in exempt\n',
        'p.ndim > 1 and not name.endswith(".bias")\n',
    ),
    Fault(
        "label smoothing of mixed images not what was asked for",
        "cli/train/classify.py",
        "                label_smoothing=options.label_smoothing,\n",
        "",
    ),
    Fault(
        "documents held out are trained on",
        "cli/train/mlm.py",
        "if place % 100 != 99]",
        "if place % 100 != 0]",
    ),
    Fault(
        "scores of GLUE are those of one process's share",
        "cli/train/glue.py",
        "rows = gather_object(self.rows)",
        "rows = self.rows",
    ),
    Fault(
        "box of a mask ends in corners, not width and height",
        "cli/train/coco_records.py",
        "*np.ptp(points, 0).tolist()]",
        "*points.max(0).tolist()]",
    ),
    Fault(
        "what a crop adds is trained on as the first class",
        "cli/train/segment.py",
        "Mask: IGNORED}",
        "Mask: 0}",
    ),
    Fault(
        "labels by the classes of the folder, not of the training",
        "cli/train/examinations.py",
        "LabelledImages(folder, predictor.classes, predictor.mode, options.max_pixels)",
        "LabelledImages(folder, [*folder.classes], predictor.mode, options.max_pixels)",
    ),
    Fault(
        "transparency of other modes than RGBA is not made white",
        "cli/images.py",
        "if image.has_transparency_data:",
        'if image.mode == "RGBA":',
    ),
    Fault(
        "small classes have no images to evaluate on",
        "cli/image_folder.py",
        "min(max(1, round(share * len(indices))), len(indices) - 1)",
        "min(round(share * len(indices)), len(indices) - 1)",
    ),
    Fault(
        "links to folders are not followed",
        "cli/files.py",
        "entry.is_dir() for entry",
        "entry.is_dir(follow_symlinks=False) for entry",
    ),
    Fault(
        "best of several trainings is the last evaluation",
        "cli/train/__init__.py",
        "train(kind, single).best",
        "train(kind, single).history[-1][kind.monitor]",
    ),
    Fault(
        "batch of broken samples alone passes unnoted",
        "cli/train/evaluation.py",
        "            note(failures)\n            if batch is not None:\n",
        "            if batch is not None:\n                note(failures)\n",
    ),
    Fault(
        "image is turned by its EXIF data, its labels are not",
        "cli/train/ade20k.py",
        "read_image(image_path, self.max_pixels, upright)",
        "read_image(image_path, self.max_pixels)",
    ),
    Fault(
        "of equally good evaluations the one of the largest loss is kept",
        "cli/train/task.py",
        "entry.get(cls.monitor, math.nan), -loss)",
        "entry.get(cls.monitor, math.nan), loss)",
    ),
    Fault(
        "mismatched figures of MNLI are those of the matched file",
        "cli/train/glue_data.py",
        '"mismatched": "dev_mismatched.tsv"',
        '"mismatched": "dev_matched.tsv"',
    ),
    Fault(
        "second text of a pair is of the first segment",
        "cli/train/texts.py",
        'pair=f"{first} $A {last} $B:1 {last}:1"',
        'pair=f"{first} $A {last} $B {last}"',
    ),
    Fault(
        "values that begin with n are not given",
        "cli/train/configuration.py",
        're.compile("(~|null|Null|NULL|)$")',
        're.compile("(~|null|Null|NULL|)")',
    ),
    Fault(
        "lines in another encoding are read as replacement characters",
        "cli/train/lines.py",
        'line.removesuffix(b"\\r").decode()',
        'line.removesuffix(b"\\r").decode(errors="replace")',
    ),
    Fault(
        "infinite loss is no divergence",
        "cli/train/divergence.py",
        "        if not value.isfinite():\n",
        "        if value.isnan():\n",
    ),
    Fault(
        "boxes are mirrored at the height of the image",
        "cli/train/coco.py",
        "canvas_size=(height, width)",
        "canvas_size=(width, height)",
    ),
    Fault(
        "pretrained classifier is drawn anew though its classes are as many",
        "cli/train/backbones.py",
        "if any(name in state and state[name].shape != own[name].shape for name in heads):",
        "if any(name in state for name in heads):",
    ),
    Fault(
        "folders train and val become the classes of --val-share",
        "cli/train/labelled_images.py",
        "if split.is_dir() and visible(split)[0]:",
        "if split.is_dir() and visible(split)[1]:",
    ),
    Fault(
        "parameters without gradients go on with a step that they never took",
        "cli/train/parallel.py",
        "    for name, parameter in model.named_parameters():\n"
        '        if name not in state["state"]:\n'
        "            optimizer.state.pop(parameter, None)\n",
        "",
    ),
    Fault(
        "file of options wins over the command line",
        "cli/train/options.py",
        "super().parse_known_args([*entries, *args], namespace)",
        "super().parse_known_args([*args, *entries], namespace)",
    ),
    Fault(
        "areas of many objects are left out of the evaluation",
        "cli/train/detect.py",
        '"val2017", self.masks, crowds=True, classes',
        '"val2017", self.masks, crowds=False, classes',
    ),
    Fault(
        "newest checkpoints are removed, not the oldest",
        "cli/train/checkpoints.py",
        "self.paths()[KEPT:]",
        "self.paths()[:-KEPT]",
    ),
    Fault(
        "time left of a resumed training counts steps of the session before",
        "cli/train/journal.py",
        "(time.monotonic() - self.began) / (step - self.first)",
        "(time.monotonic() - self.began) / step",
    ),
    Fault(
        "--annotated is ignored in evaluation",
        "cli/train/examinations.py",
        "Ade20k(data, options.split, transform, options.annotated, options.max_pixels)",
        "Ade20k(data, options.split, transform, None, options.max_pixels)",
    ),
    Fault(
        "--max-pixels is ignored in evaluation of segmentation",
        "cli/train/examinations.py",
        "transform, options.annotated, options.max_pixels)",
        "transform, options.annotated)",
    ),
)
