"""The faults seeded into Python files: in a file of setformer_ext, `old` becomes `new`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PythonFault:
    name: str
    file: str  # below setformer_ext
    old: str  # occurs once
    new: str
    area: str  # of operation, vision, language, train, predict, explain, distributed

    def apply(self, text: str) -> str:
        """The file with the fault."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected setformer_ext/{self.file} to have this text once, it is "
                f"there {text.count(self.old)} times; change the fault with the file:\n{self.old}"
            )
        return text.replace(self.old, self.new)


OPERATION = (
    PythonFault(
        "padding of NaN reaches the gradient of the keys",
        "functional.py",
        "unit(zero_invalid(key, mask))",
        "unit(key)",
        "operation",
    ),
    PythonFault(
        "gradient of packed token masses with heads and tokens mixed up",
        "ops.py",
        "part.view(1, heads, -1)",
        "part.view(1, -1, heads).transpose(1, 2)",
        "operation",
    ),
    PythonFault(
        "gradient of the plan is of normalised vectors",
        "autograd.py",
        "reference.transport_plan(**arguments | inputs, normalize=False)",
        "reference.transport_plan(**arguments | inputs)",
        "operation",
    ),
    PythonFault(
        "vmap gives samples the references of others",
        "transforms.py",
        "tensor.unsqueeze(1).expand(size, batch, *tensor.shape[1:])",
        "tensor.unsqueeze(0).expand(batch, *tensor.shape)",
        "operation",
    ),
    PythonFault(
        "FLOPs without the solve of the queries",
        "transforms.py",
        "per_query = 2 * depth + 4 * iterations + 2 * value_depth + 2",
        "per_query = 2 * value_depth + 2",
        "operation",
    ),
    PythonFault(
        "mean of the tokens over padding too",
        "modules.py",
        "    valid = x.new_ones(x.shape[:2]) if mask is None else mask\n"
        "    return (total / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)\n",
        "    return (total / x.shape[1]).to(x.dtype)\n",
        "operation",
    ),
    PythonFault(
        "gradient as if the floor of eigenvalues did not act",
        "nystrom.py",
        "difference = difference * torch.where(one, share, both.to(share.dtype))",
        "difference = torch.where(one, difference * share, difference)",
        "operation",
    ),
    PythonFault(
        "parts of a sequence end before the token that two of them share",
        "layout.py",
        "torch.where(rank * count < (part + 1) * total, rank + 1, 0)",
        "torch.where(rank < (part + 1) * total // count, rank + 1, 0)",
        "operation",
    ),
    PythonFault(
        "gradient of zero vectors explodes",
        "unit.py",
        "length = torch.where(length > SHORTEST, length, 1)",
        "length = length.clamp(min=SHORTEST)",
        "operation",
    ),
    PythonFault(
        "masses of references sum to M in the definition",
        "reference.py",
        "mass.log() - mass.sum(-1, keepdim=True).log()",
        "mass.log() - mass.mean(-1, keepdim=True).log()",
        "operation",
    ),
    PythonFault(
        "another default of epsilon for NumPy",
        "numpy.py",
        "epsilon: ArrayLike = 0.04,",
        "epsilon: ArrayLike = 0.05,",
        "operation",
    ),
    PythonFault(
        "ONNX without the positions of the queries",
        "onnx.py",
        "            query_positions=problem.query_positions,\n",
        "",
        "operation",
    ),
)

VISION = (
    PythonFault(
        "stochastic depth does not scale what it keeps",
        "vision/blocks.py",
        "DropPath(drop_path)",
        "DropPath(drop_path, scale_by_keep=False)",
        "vision",
    ),
    PythonFault(
        "defaults win over the options of the backbone's attention",
        "vision/backbone.py",
        "ATTENTION_OPTIONS | (attention_options or {})",
        "(attention_options or {}) | ATTENTION_OPTIONS",
        "vision",
    ),
    PythonFault(
        "windows leave out the end of an image",
        "vision/segmentation.py",
        "steps = -(-max(length - window, 0) // max(1, 2 * window // 3))",
        "steps = max(length - window, 0) // max(1, 2 * window // 3)",
        "vision",
    ),
    PythonFault(
        "images to segment are shrunk without antialiasing",
        "vision/segmentation.py",
        'F.interpolate(x, target, mode="bilinear", antialias=True)',
        'F.interpolate(x, target, mode="bilinear")',
        "vision",
    ),
    PythonFault(
        "boxes in bfloat16 under autocast",
        "vision/detection.py",
        "(model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor)",
        "(model.rpn.head, model.roi_heads.mask_predictor)",
        "vision",
    ),
)

LANGUAGE = (
    PythonFault(
        "loss of a regression between all pairs of a batch",
        "language/heads.py",
        "F.mse_loss(logits.float().view_as(labels), labels.float())",
        "F.mse_loss(logits.float(), labels.float())",
        "language",
    ),
    PythonFault(
        "queries of padding take part in their transport",
        "language/references.py",
        "            query_mask=mask,\n",
        "",
        "language",
    ),
    PythonFault(
        "shared keys go to every G-th head instead of neighbours",
        "language/switch.py",
        "        repeat_kv(key, groups),\n        repeat_kv(value, groups),\n",
        "        key.repeat(1, groups, 1, 1),\n        value.repeat(1, groups, 1, 1),\n",
        "language",
    ),
    PythonFault(
        "convolution over tokens sees padding",
        "language/encoder.py",
        "x = x + self.position(x, mask)",
        "x = x + self.position(x, None)",
        "language",
    ),
    PythonFault(
        "learning rate of a distillation does not fall",
        "language/distillation.py",
        "            schedule.step()\n",
        "",
        "language",
    ),
    PythonFault(
        "weights of an encoder that are missing are drawn and not named",
        "language/saved.py",
        '    redrawn += [key for key in found["missing_keys"] if key.startswith("setformer.")]\n',
        "",
        "language",
    ),
)

TRAIN = (
    PythonFault(
        "moving average not restored on resume",
        "train/learner.py",
        "        if self.ema is not None:\n"
        '            parallel.load_whole_state(self.averaged, state["ema"])\n',
        "",
        "train",
    ),
    PythonFault(
        "training goes on in eval mode after an evaluation",
        "train/loop.py",
        "        self.learner.model.train()\n",
        "",
        "train",
    ),
    PythonFault(
        "every epoch in the same order",
        "train/sampling.py",
        "np.random.default_rng((self.seed, ORDER, epoch))",
        "np.random.default_rng((self.seed, ORDER))",
        "train",
    ),
    PythonFault(
        "exempt parameters outside of a backbone decay",
        "train/optimization.py",
        '(p.ndim > 1 and not name.endswith(".bias") and id(p) not in exempt)',
        '(p.ndim > 1 and not name.endswith(".bias"))',
        "train",
    ),
    PythonFault(
        "label smoothing of mixed images not what was asked for",
        "train/classify.py",
        "                label_smoothing=options.label_smoothing,\n",
        "",
        "train",
    ),
    PythonFault(
        "documents held out are trained on",
        "train/mlm.py",
        "if place % 100 != 99]",
        "if place % 100 != 0]",
        "train",
    ),
    PythonFault(
        "scores of GLUE are those of one process's share",
        "train/glue.py",
        "rows = gather_object(self.rows)",
        "rows = self.rows",
        "train",
    ),
    PythonFault(
        "box of a mask ends in corners, not width and height",
        "train/coco_records.py",
        "*np.ptp(points, 0).tolist()]",
        "*points.max(0).tolist()]",
        "train",
    ),
    PythonFault(
        "what a crop adds is trained on as the first class",
        "train/segment.py",
        "Mask: IGNORED}",
        "Mask: 0}",
        "train",
    ),
    PythonFault(
        "labels by the classes of the folder, not of the training",
        "train/examinations.py",
        "LabelledImages(folder, predictor.classes, predictor.mode, options.max_pixels)",
        "LabelledImages(folder, [*folder.classes], predictor.mode, options.max_pixels)",
        "train",
    ),
    PythonFault(
        "transparency of other modes than RGBA is not made white",
        "images.py",
        "if image.has_transparency_data:",
        'if image.mode == "RGBA":',
        "train",
    ),
)

PREDICT = (
    PythonFault(
        "labels of a segmentation written from 0 on whatever the training's",
        "predict/predictors.py",
        "Segmentation(self.classes, labels, self.labels.first)",
        "Segmentation(self.classes, labels)",
        "predict",
    ),
    PythonFault(
        "the least sure object covers the others",
        "predict/masks.py",
        "for number in range(len(answer.masks), 0, -1):",
        "for number in range(1, len(answer.masks) + 1):",
        "predict",
    ),
    PythonFault(
        "pictures of images of one name overwrite each other",
        "predict/on_images.py",
        "    taken.update(path.resolve() for path in paths)\n",
        "",
        "predict",
    ),
    PythonFault(
        "an export whose answers are NaN passes its check",
        "export.py",
        "if not difference <= allowed:",
        "if difference > allowed:",
        "predict",
    ),
)

EXPLAIN = (
    PythonFault(
        "patches shifted by the tokens before them",
        "explain/encoders.py",
        "normalised(plans[:, plans.shape[1] - patches :])",
        "normalised(plans[:, :patches])",
        "explain",
    ),
    PythonFault(
        "shares of words divided by the wrong sums",
        "explain/sentence.py",
        "shares = (plan / plan.sum(0)).T",
        "shares = (plan / plan.sum(1, keepdim=True)).T",
        "explain",
    ),
)

DISTRIBUTED = (
    PythonFault(
        "gradient of masses of references once for each rank",
        "distributed/operations.py",
        "return gradients._replace(reference_mass=gradients.reference_mass / ranks.count)",
        "return gradients",
        "distributed",
    ),
    PythonFault(
        "ranks merge logarithms to base 2 as natural ones",
        "distributed/ranks.py",
        "(x - base).exp2().sum(0).log2() + base",
        "(x - base).exp().sum(0).log() + base",
        "distributed",
    ),
)

PYTHON_FAULTS = (
    *OPERATION,
    *VISION,
    *LANGUAGE,
    *TRAIN,
    *PREDICT,
    *EXPLAIN,
    *DISTRIBUTED,
)
