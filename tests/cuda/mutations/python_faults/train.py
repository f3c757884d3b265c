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
        "layer decay is ignored",
        "cli/train/optimization.py",
        "parameter_groups(model, options.weight_decay, options.layer_decay)",
        "parameter_groups(model, options.weight_decay, 1.0)",
    ),
    Fault(
        "layer decay is squared",
        "cli/train/optimization.py",
        "param_groups_layer_decay(backbone, layer_decay=layer_decay)",
        "param_groups_layer_decay(backbone, layer_decay=layer_decay**2)",
    ),
    Fault(
        "squares of gradients are averaged over ten steps",
        "cli/train/optimization.py",
        "lr=options.lr, weight_decay=options.weight_decay)",
        "lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.9))",
    ),
    Fault(
        "gradient checkpointing is ignored",
        "cli/train/learner.py",
        "        if options.gradient_checkpointing:\n"
        "            _checkpoint_gradients(self.model)\n",
        "",
    ),
    Fault(
        "weights are not sharded",
        "cli/train/learner.py",
        "        if options.shard:\n            # Processes",
        "        if False:\n            # Processes",
    ),
    Fault(
        "all passes and processes draw the same numbers",
        "cli/train/loop.py",
        "STEP, progress.step, index, self.rank)",
        "STEP, progress.step)",
    ),
    Fault(
        "losses before a resume count once in each process",
        "cli/train/loop.py",
        "share = float(self.rank == 0)",
        "share = 1.0",
    ),
    Fault(
        "sum of the training losses is not told",
        "cli/train/loop.py",
        "        if EVAL_LOSS not in figures:\n"
        "            means[TRAIN_LOSS] = sum(means.values())\n",
        "",
    ),
    Fault(
        "evaluations without mixed precision",
        "cli/train/evaluation.py",
        "with torch.no_grad(), accelerator.autocast():",
        "with torch.no_grad():",
    ),
    Fault(
        "crops of classes have any area",
        "cli/train/classify.py",
        "                scale=(options.crop_scale, 1.0),\n",
        "",
    ),
    Fault(
        "images of classes are mirrored half of the time",
        "cli/train/classify.py",
        "                hflip=options.flip,\n",
        "",
    ),
    Fault(
        "strength of the color jitter is ignored",
        "cli/train/classify.py",
        "color_jitter=options.color_jitter or None",
        "color_jitter=0.4 if options.color_jitter else None",
    ),
    Fault(
        "nothing is erased",
        "cli/train/classify.py",
        "                re_prob=options.random_erasing,\n",
        "",
    ),
    Fault(
        "nothing is pasted into images",
        "cli/train/classify.py",
        "                options.cutmix,\n",
        "                0.0,\n",
    ),
    Fault(
        "training images of classes alias",
        "cli/train/classify.py",
        "                **common,\n                is_training=True,\n",
        '                **{**common, "interpolation": "nearest"},\n'
        "                is_training=True,\n",
    ),
    Fault(
        "views to segment are not scaled",
        "cli/train/segment.py",
        "random.uniform(*jitter) * enlargement(mask.shape, short_side)",
        "enlargement(mask.shape, short_side)",
    ),
    Fault(
        "views to segment are of the least factor",
        "cli/train/segment.py",
        "random.uniform(*jitter) * enlargement",
        "jitter[0] * enlargement",
    ),
    Fault(
        "views to segment are mirrored half of the time",
        "cli/train/segment.py",
        "v2.RandomHorizontalFlip(options.flip)",
        "v2.RandomHorizontalFlip()",
    ),
    Fault(
        "colours of segments are never distorted",
        "cli/train/segment.py",
        "([v2.RandomPhotometricDistort()] if options.photometric else [])",
        "([] if options.photometric else [])",
    ),
    Fault(
        "segmenters are evaluated at the images' own size",
        "cli/train/segment.py",
        "IntersectionOverUnion(self.labels.names, options.short_side, options.window)",
        "IntersectionOverUnion(self.labels.names, 0, options.window)",
    ),
    Fault(
        "probabilities of the two mirrorings swapped",
        "cli/train/detect.py",
        "            v2.RandomHorizontalFlip(options.flip),\n"
        "            v2.RandomVerticalFlip(options.vertical_flip),\n",
        "            v2.RandomHorizontalFlip(options.vertical_flip),\n"
        "            v2.RandomVerticalFlip(options.flip),\n",
    ),
    Fault(
        "objects are scaled by factors from 0.1 to 2",
        "cli/train/detect.py",
        "ScaleJitter(size, tuple(options.scale_jitter))",
        "ScaleJitter(size)",
    ),
    Fault(
        "colours of objects are never distorted",
        "cli/train/detect.py",
        "        if options.photometric:\n",
        "        if not options:\n",
    ),
    Fault(
        "only the first of several sizes is trained on",
        "cli/train/detect.py",
        '"min_size": options.min_size,',
        '"min_size": options.min_size[:1],',
    ),
    Fault(
        "squares to train on are of the first size",
        "cli/train/detect.py",
        "(options.min_size[-1],) * 2",
        "(options.min_size[0],) * 2",
    ),
    Fault(
        "texts are cut to 128 tokens whatever was asked for",
        "cli/train/glue.py",
        "task=self.glue, length=options.sequence_length\n",
        "task=self.glue, length=128\n",
    ),
    Fault(
        "capital letters are never told apart",
        "cli/train/mlm.py",
        "not options.cased, options.alphabet",
        "True, options.alphabet",
    ),
    Fault(
        "gradients are not clipped by default",
        "cli/train/options.py",
        '"--clip-grad NORM", not_negative, 1.0',
        '"--clip-grad NORM", not_negative, 0.0',
    ),
    Fault(
        "moving average forgets in ten steps by default",
        "cli/train/options.py",
        '"--ema-decay DECAY", fraction, 0.9998',
        '"--ema-decay DECAY", fraction, 0.9',
    ),
    Fault(
        "learning rate rises over half of the steps by default",
        "cli/train/options.py",
        '"--warmup SHARE", fraction, 0.05',
        '"--warmup SHARE", fraction, 0.5',
    ),
    Fault(
        "options that change the numbers may change on resume",
        "cli/train/options.py",
        '"on_error", "output", "resume", "run"',
        '"on_error", "output", "resume", "run", "clip_grad", "ema_decay", "precision"',
    ),
    Fault(
        "detectors learn a hundred times as fast by default",
        "cli/train/detect.py",
        '"epochs": 36, "lr": 1e-4',
        '"epochs": 36, "lr": 1e-2',
    ),
    Fault(
        "texts are classified at a hundred times the rate by default",
        "cli/train/glue.py",
        '"epochs": 3, "lr": 2e-5',
        '"epochs": 3, "lr": 2e-3',
    ),
    Fault(
        "one evaluation in all of the steps",
        "cli/train/loop.py",
        "options.steps // 10 if options.steps",
        "options.steps if options.steps",
    ),
    Fault(
        "epochs between evaluations are those of one process and pass",
        "cli/train/loop.py",
        "round(self.train_data.size / per_step)",
        "round(self.train_data.size / options.batch_size)",
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
