"""Faults in the operation, its module and its torch layer."""

from __future__ import annotations

from ..seeding import Seeded as Fault

OPERATION = (
    Fault(
        "padding of NaN reaches the definition",
        "reference.py",
        "    key = zero_invalid(key, mask)\n",
        "",
    ),
    Fault(
        "float64 becomes the type of autocast",
        "transforms.py",
        "if problem.key.dtype != torch.float64 and problem.key.device.type == device:",
        "if problem.key.device.type == device:",
    ),
    Fault(
        "longest packed sequence taken for the first",
        "ops.py",
        "max(int(offsets.diff().max()), 0)",
        "max(int(offsets.diff()[0]), 0)",
    ),
    Fault(
        "plan of keys that autocast has not rounded",
        "functional.py",
        "problem.in_storage_type(storage).in_storage_type(accumulate_dtype(storage))",
        "problem.in_storage_type(accumulate_dtype(storage))",
    ),
    Fault(
        "vmap gives samples the references of others",
        "transforms.py",
        "tensor.unsqueeze(1).expand(size, batch, *tensor.shape[1:])",
        "tensor.unsqueeze(0).expand(batch, *tensor.shape)",
    ),
    Fault(
        "FLOPs without the solve of the queries",
        "transforms.py",
        "per_query = 2 * depth + 4 * iterations + 2 * value_depth + 2",
        "per_query = 2 * value_depth + 2",
    ),
    Fault(
        "mean of the tokens over padding too",
        "modules.py",
        "    valid = x.new_ones(x.shape[:2]) if mask is None else mask\n"
        "    return (total / valid.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)\n",
        "    return (total / x.shape[1]).to(x.dtype)\n",
    ),
    Fault(
        "gradient as if the floor of eigenvalues did not act",
        "nystrom.py",
        "difference = difference * torch.where(one, share, both.to(share.dtype))",
        "difference = torch.where(one, difference * share, difference)",
    ),
    Fault(
        "parts of a sequence end before the token that two of them share",
        "layout.py",
        "torch.where(rank * count < (part + 1) * total, rank + 1, 0)",
        "torch.where(rank < (part + 1) * total // count, rank + 1, 0)",
    ),
    Fault(
        "vectors of NumPy keep their lengths",
        "numpy.py",
        '"normalize": True, **options}',
        '"normalize": False, **options}',
    ),
    Fault(
        "masses of references sum to M in the definition",
        "reference.py",
        "mass.log() - mass.sum(-1, keepdim=True).log()",
        "mass.log() - mass.mean(-1, keepdim=True).log()",
    ),
    Fault(
        "another default of epsilon for NumPy",
        "numpy.py",
        '"epsilon": 0.04,',
        '"epsilon": 0.05,',
    ),
    Fault(
        "ONNX without the positions of the queries",
        "onnx.py",
        "definition.set_attention(**problem.arguments())",
        'definition.set_attention(**problem.arguments() | {"query_positions": None})',
    ),
    Fault(
        "packed sequences of one head or one token come out in another shape",
        "functional.py",
        "return output.squeeze(0).transpose(0, 1)",
        "return output.squeeze().transpose(0, 1)",
    ),
    Fault(
        "positions that depend on parameters get no gradient, and nobody is told",
        "arguments.py",
        "if name in POSITIONS and x.requires_grad:",
        "if name in POSITIONS and x.requires_grad and x.is_leaf:",
    ),
    Fault(
        "parameters that a parametrization keeps in two parts decay",
        "weight_decay.py",
        r'r"(?<![^.])parametrizations\.(\w+)\.original\d*$"',
        r'r"(?<![^.])parametrizations\.(\w+)\.original$"',
    ),
    Fault(
        "softmax to compare with starts from smaller weights than SeT attention",
        "controls.py",
        "(*self.query_key_value.weight.chunk(3), self.projection.weight)",
        "(self.query_key_value.weight, self.projection.weight)",
    ),
    Fault(
        "public functions without signature and documentation",
        "foreign.py",
        "    @wraps(function)\n",
        "",
    ),
    Fault(
        "tangents of forward mode are lost instead of refused",
        "autograd.py",
        "or forward_ad._current_level < 0:",
        "or forward_ad._current_level <= 0:",
    ),
    Fault(
        "floating-point operations of one token too many",
        "transforms.py",
        '        "tokens": tokens,\n',
        '        "tokens": tokens + 1,\n',
    ),
    Fault(
        "bandwidth of the module is 1",
        "modules.py",
        '"bandwidth": self.bandwidth if self.anchor is None else 1.0,',
        '"bandwidth": 1.0,',
    ),
    Fault(
        "epsilon of the module is the default",
        "modules.py",
        '            "epsilon": self.epsilon,\n',
        '            "epsilon": 0.04,\n',
    ),
    Fault(
        "kernel of the module is always gaussian",
        "modules.py",
        '"kernel": self.kernel if self.anchor is None else "linear",',
        '"kernel": "gaussian" if self.anchor is None else "linear",',
    ),
    Fault(
        "features of anchors without the bandwidth",
        "modules.py",
        "nystrom_features(unit(x), unit(self.anchor), self.bandwidth)",
        "nystrom_features(unit(x), unit(self.anchor))",
    ),
    Fault(
        "features of anchors scaled to unit length",
        "modules.py",
        '"normalize": self.anchor is None,',
        '"normalize": True,',
    ),
    Fault(
        "masses that an input adds are subtracted",
        "modules.py",
        "logits = logits + self.reference_mass(",
        "logits = logits - self.reference_mass(",
    ),
    Fault(
        "references are pooled values",
        "modules.py",
        "reference = self._points(self.key(pooled))",
        "reference = self._points(self.value(pooled))",
    ),
    Fault(
        "grid of the references is transposed",
        "modules.py",
        "if grid is None else nearly_square(self.num_references)",
        "if grid is None else nearly_square(self.num_references)[::-1]",
    ),
    Fault(
        "masks of a problem may hide nothing",
        "cli/selftest/problems.py",
        "        mask[..., -1:] &= ~mask.all(-1, keepdim=True)\n",
        "        mask[..., -1:] &= True\n",
    ),
    Fault(
        "masks of a problem may hide everything",
        "cli/selftest/problems.py",
        "    mask[..., :1] |= ~mask.any(-1, keepdim=True)\n",
        "",
    ),
    Fault(
        "heads of a problem may be without mass",
        "cli/selftest/problems.py",
        '            holds ^= ~(holds & arguments["mask"].unsqueeze(1)).any(-1, keepdim=True)\n',
        "            holds ^= False\n",
    ),
    Fault(
        "second derivative takes packed queries by the ends of the keys",
        "problem.py",
        "ends if queries is None else [int(end) for end in queries.cpu()]",
        "ends",
    ),
    Fault(
        "second derivative is computed in the storage type",
        "autograd.py",
        "    tensor = tensor.to(accumulate_dtype(tensor.dtype))\n",
        "",
    ),
)
