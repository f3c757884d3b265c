"""Small models of transformers with SeT attention, and the formula, for the tests of it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from setformer_ext.language import register
from setformer_ext.language.references import References

register()

NAME = "set_attention"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = {**SMALL, "vocab_size": 60, "initializer_range": 0.3}
VISION = {**SMALL, "image_size": 30, "patch_size": 6, "initializer_range": 0.3}
CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **o: transformers.BertConfig(**TEXT, **o),
    "roberta": lambda **o: transformers.RobertaConfig(**TEXT, pad_token_id=1, **o),
    "vit": lambda **o: transformers.ViTConfig(**VISION, **o),
    "dinov2": lambda **o: transformers.Dinov2Config(**VISION, **o),
}
CAUSAL = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**TEXT)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60),
    ),
}


def make(
    kind: str = "bert",
    auto: Any = transformers.AutoModel,
    implementation: str = NAME,
    **options: Any,
) -> Any:
    """In eval mode, with references and masses that do something."""
    config = CONFIGS[kind](set_attention={"num_references": 5, **options})
    model = auto.from_config(config, attn_implementation=implementation).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, References):
            for parameter in module.parameters():
                nn.init.normal_(parameter)


def references(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.state_dict().items() if f".{NAME}." in n}


def inputs(kind: str = "bert") -> dict[str, Tensor]:
    if kind in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(3, 3, 30, 30)}
    words = torch.randint(2, 60, (3, 11))
    mask = torch.ones_like(words)
    mask[0, 7:] = 0
    mask[2, 2:] = 0
    return {"input_ids": words, "attention_mask": mask}


# The formula


def formula(
    module: References, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, epsilon: float
) -> Tensor:
    """Step by step in float64, as the design has it: [B, H, N, Dv]."""
    module = copy.deepcopy(module).double()
    q, k, v = query.double(), key.double(), value.double()
    c = module.query_log_scale.exp()
    s_key = torch.einsum("bhnd,hmd->bhnm", k, module.reference) / epsilon
    s_query = torch.einsum("bhnd,hmd,h->bhnm", q, module.reference, c) / epsilon
    outside = ~mask[:, None, :]
    log_a = torch.zeros_like(k[..., 0])
    log_b = torch.zeros_like(module.reference[..., 0])
    if module.iterations:
        drawn = torch.einsum("bhnd,hrd->bhnr", k, module.mass_point) / epsilon
        log_a = drawn.exp().sum(-1).log()
        log_b = module.reference_log_mass.log_softmax(-1)

    def solve(s: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
        log_a = log_a.masked_fill(outside, -torch.inf).log_softmax(-1)
        f, g = log_a, torch.zeros_like(s[:, :, 0])
        for _ in range(module.iterations):
            f = log_a - (s + g[:, :, None]).logsumexp(-1)
            g = log_b - (s + f[..., None]).logsumexp(-2)
        return f, g

    f, _ = solve(s_key, log_a)
    _, g = solve(s_query, torch.zeros_like(log_a))
    pooled = (s_key + f[..., None]).softmax(-2).mT @ v
    output = (s_query + g[:, :, None]).softmax(-1) @ pooled
    return output.masked_fill(outside[..., None], 0)


def attention_module(heads: int = 4, depth: int = 8, **options: Any) -> nn.Module:
    """As much of an attention module as the function looks at."""
    module = nn.Module()
    module.set_attention = References(heads, depth, num_references=5, **options)
    randomize(module)
    return module
