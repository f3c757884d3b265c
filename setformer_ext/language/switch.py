"""SeT attention inside other models of transformers: ``attn_implementation="set_attention"``."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import bidirectional_mask_function

from .masks import valid_tokens
from .references import DEFAULT_OPTIONS, References

NAME = "set_attention"

# Options that change the result of other attentions, and have no counterpart here.
_REFUSED = (
    "is_causal",
    "output_attentions",
    "position_bias",
    "sliding_window",
    "softcap",
    "s_aux",
    "cu_seq_lens_q",
)


def register() -> None:
    """Make ``attn_implementation="set_attention"`` known to transformers; once is enough.

    Call it before models are built or loaded with that implementation::

        setformer_ext.language.register()
        model = AutoModel.from_pretrained(path, attn_implementation="set_attention")

    or switched to it, by ``model.set_attn_implementation("set_attention")``. Every attention module
    then has a submodule ``set_attention``, its :class:`References`, whose parameters are trained,
    saved and loaded with the model. Those that a checkpoint lacks are drawn at random;
    :func:`setformer_ext.language.distill_attention` fits them to the softmax attention that they
    replace. As always with transformers, the name of the implementation is not saved: loading asks
    for it again. Switched back to "sdpa", a model gives its original answers and keeps the
    references.

    Options are a dict ``config.set_attention``, saved with the configuration:
    ``num_references`` (64), ``epsilon`` (None) and ``iterations`` (1; 0 for two softmaxes without
    transport) of :class:`References`; they are given before the references are made, and refused
    with a ValueError where they change later. Masks [B, N] may be additive, 0 for valid tokens.

    Encoders can have it whose attention goes through transformers' interface and masks padding
    only, such as BERT, RoBERTa, ViT and DINOv2; several heads of queries may share one of keys.
    Causal models, cross attention, sliding windows, packed sequences, prepared masks and biases of
    the scores raise a ValueError: when the model is built or switched if its modules tell, else
    when it is called. There is no N x N matrix: ``output_attentions`` is refused, and dropout of
    attention weights is left out.
    """
    if NAME in AttentionInterface().valid_keys():
        return
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)
    # transformers has no hook for an attention implementation with parameters of its own.
    _extend("post_init", _attach_first)
    _extend("set_attn_implementation", _switch)
    _extend("_initialize_weights", _initialize_references)
    _extend("save_pretrained", _save_own_options)


def _extend(name: str, extended: Callable) -> None:
    """Replace a method of all models: ``extended`` gets the known method, then its arguments."""
    known = getattr(PreTrainedModel, name)

    @functools.wraps(known)
    def method(*args: Any, **kwargs: Any) -> Any:
        return extended(known, *args, **kwargs)

    setattr(PreTrainedModel, name, method)


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, G, N, D], G divides H
    value: Tensor,  # [B, G, N, Dv]
    attention_mask: Tensor | None,  # [B, N] bool
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:  # [B, N, H, Dv]
    """What transformers calls in place of softmax attention.

    Args:
        module: the attention module, with :class:`References` as ``module.set_attention``.
        query: [B, H, N, D].
        key: [B, G, N, D], each for H / G consecutive heads of queries.
        value: [B, G, N, Dv].
        attention_mask: bool [B, N], True = valid, as :func:`padding_mask` makes it.
        scaling: factor of softmax attention's scores, 1 / sqrt(D) if None.
        dropout: of attention weights, of which there are none: ignored.
        options: what else the model passes on.

    Returns:
        [B, N, H, Dv], 0 where not valid, and None for the attention weights.

    Raises:
        RuntimeError: the module has no references.
        ValueError: any attention other than of all tokens to all valid tokens.
    """
    references = getattr(module, NAME, None)  # perhaps wrapped by peft, torch.compile, ...
    if not isinstance(references, nn.Module):
        raise RuntimeError(
            f"set_attention: {type(module).__name__} must have references, got none; call "
            "setformer_ext.language.register() and then "
            'model.set_attn_implementation("set_attention")'
        )
    for name in _REFUSED:
        option = options.get(name)
        if option is not None and option is not False:
            got = list(option.shape) if isinstance(option, Tensor) else option
            raise _refusal(name, "None or False", got)
    batch, heads, tokens, depth = query.shape
    if key.shape[2] != tokens:
        expected = f"N={tokens} tokens as the query has (no cross attention, no cache)"
        raise _refusal("key", expected, list(key.shape))
    if attention_mask is not None and (
        attention_mask.dtype != torch.bool or attention_mask.shape != (batch, tokens)
    ):
        expected = "bool [B, N] or None, which masks padding and nothing else"
        raise _refusal(
            "attention_mask", expected, f"{attention_mask.dtype} {list(attention_mask.shape)}"
        )
    groups = heads // key.shape[1]
    output = references(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attention_mask,
        depth**-0.5 if scaling is None else scaling,
    )
    return output.transpose(1, 2).contiguous(), None


def padding_mask(
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: Tensor | None = None,  # [B, N] bool
    **_: Any,
) -> Tensor | None:  # [B, N] bool
    """What transformers calls to prepare the mask: returns the mask of padding unchanged.

    Raises:
        ValueError: for anything but attention of all tokens to all valid tokens.
    """
    if mask_function is not bidirectional_mask_function:
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise _refusal("the model", "of full bidirectional attention", name)
    if q_length != kv_length:
        expected = f"N={q_length} tokens as the query has (no cross attention, no cache)"
        raise _refusal("key", expected, kv_length)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise _refusal("attention_mask", "[B, N] or None", list(attention_mask.shape))
    return attention_mask


def _attach_first(post_init: Callable, model: PreTrainedModel) -> None:
    """Make references before weights are initialised, or loaded by from_pretrained."""
    _attach(model)
    post_init(model)


def _switch(
    set_attn_implementation: Callable,
    model: PreTrainedModel,
    attn_implementation: Any,
    *args: Any,
    **more: Any,
) -> None:
    """Give a switched model references where it has none; a refused model is left as it was."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(module.config, module.config._attn_implementation) for module in models]
    set_attn_implementation(model, attn_implementation, *args, **more)
    try:
        if attn_implementation == NAME != model.config._attn_implementation:
            raise _not_recognised(model)
        _attach(model)
    except ValueError:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        raise


def _initialize_references(
    initialize_weights: Callable, model: PreTrainedModel, module: nn.Module, *args: Any, **more: Any
) -> None:
    """Initialise references, which models do not know."""
    done = getattr(module, "_is_hf_initialized", False)
    initialize_weights(model, module, *args, **more)
    if isinstance(module, References) and not done:
        # While transformers initialises, its torch.nn.init leaves loaded parameters as they are.
        module.reset_parameters()
        loaded = (getattr(p, "_is_hf_initialized", False) for p in module.parameters())
        module.stored = all(loaded)


def _save_own_options(
    save_pretrained: Callable, model: PreTrainedModel, *args: Any, **more: Any
) -> Any:
    """Save the options of the references with a checkpoint: without them it could not be loaded."""
    for module in filter(_is_attention, model.modules()):
        config: Any = module.config
        for references in _own_references(module):
            own, said = references.options, getattr(config, NAME, None)
            if said != own:  # only a warning: an error would lose the training
                warnings.warn(
                    f"config.set_attention: saved as {own}, which the references have, "
                    f"not as {said}",
                    stacklevel=3,
                )
            config.set_attention = own
    return save_pretrained(model, *args, **more)


def _attach(model: PreTrainedModel) -> None:
    """Give every attention module that should have references its own, or refuse the model."""
    modules = [
        (f"{name} of {type(model).__name__}", module)
        for name, module in model.named_modules()
        if _is_attention(module) and module.config._attn_implementation == NAME
    ]
    if not modules and model.config._attn_implementation == NAME:
        raise _not_recognised(model)
    for name, module in modules:
        _require_bidirectional(name, module)
        _require_own_options(name, module)
    made = [
        (module, _references(name, module)) for name, module in modules if not hasattr(module, NAME)
    ]
    if made and hasattr(model, "peft_config"):
        raise ValueError(
            f"set_attention: {type(model).__name__} must be switched before it gets adapters, for "
            "they do not save what comes later; call set_attn_implementation first, then peft"
        )
    for module, references in made:  # only after all are made: one may be refused
        module.set_attention = references
        # Saved, so that later defaults do not change a model that was trained with these.
        module.config.set_attention = references.options
    if modules:
        _read_masks(model)


def _read_masks(model: PreTrainedModel) -> None:
    """Make the model, and the models inside it, understand additive masks of padding."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not hasattr(module, "_mask_place"):
            names = list(inspect.signature(module.forward).parameters)
            if "attention_mask" in names:
                module._mask_place = names.index("attention_mask")  # type: ignore[assignment]
                module.register_forward_pre_hook(_read_mask, with_kwargs=True)


def _read_mask(
    model: PreTrainedModel, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an additive mask into 0 and 1: transformers takes nonzero for valid, its opposite."""
    place: int = model._mask_place  # type: ignore[assignment]
    given = len(arguments) > place
    mask = arguments[place] if given else options.get("attention_mask")
    if (
        model.config._attn_implementation == NAME
        and isinstance(mask, Tensor)
        and mask.dtype != torch.bool
        and mask.dim() == 2
    ):
        mask = valid_tokens(mask).long()  # as tokenizers make it
        if given:
            arguments = (*arguments[:place], mask, *arguments[place + 1 :])
        else:
            options = {**options, "attention_mask": mask}
    return arguments, options


def _is_attention(module: nn.Module) -> bool:
    """Whether a module calls the attention interface, as far as its attributes tell."""
    # It must have a configuration of its own; a wrapper only passes one on.
    own = isinstance(vars(module).get("config"), PreTrainedConfig)
    return own and (hasattr(module, "is_causal") or hasattr(module, "scaling"))


def _require_bidirectional(name: str, module: nn.Module) -> None:
    if getattr(module, "is_causal", False):
        raise _refusal(name, "bidirectional (is_causal False)", "is_causal True")
    if "CrossAttention" in type(module).__name__ or getattr(module, "is_cross_attention", False):
        raise _refusal(name, "self attention", f"cross attention, {type(module).__name__}")
    if getattr(module, "sliding_window", None) is not None:
        raise _refusal(name, "of full attention", f"sliding_window {module.sliding_window}")


def _require_own_options(name: str, module: nn.Module) -> None:
    """Refuse changed options: the references have the shapes of their options, and were trained
    with them."""
    options = _options(module)
    for references in _own_references(module):
        for option, own in references.options.items():
            if options[option] != own:
                raise ValueError(
                    f"config.set_attention: {option} must stay {own}, as the references of {name} "
                    f"have it, got {options[option]!r}; set it back, or give it to the "
                    "configuration with which a model is built or loaded anew"
                )


def _own_references(module: nn.Module) -> list[References]:
    """The references of an attention module, even if something wraps them."""
    return [part for part in module.modules() if isinstance(part, References)]


def _options(module: nn.Module) -> dict[str, Any]:
    """The options of an attention module's references: the configuration's, else defaults."""
    given = getattr(module.config, NAME, None) or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.set_attention must be a dict of options, got {given!r}")
    unknown = set(given) - set(DEFAULT_OPTIONS)
    if unknown:
        raise ValueError(
            f"config.set_attention: options must be of {sorted(DEFAULT_OPTIONS)}, "
            f"got {sorted(unknown)}"
        )
    return DEFAULT_OPTIONS | given


def _references(name: str, module: nn.Module) -> References:
    """New references with the module's heads, device and dtype, and its configuration's options."""
    heads = _size(name, module, "num_attention_heads", "num_heads")
    depth = _size(name, module, "head_dim", "attention_head_size")
    like = _floating(module)
    references = References(heads, depth, **_options(module), device=like.device, dtype=like.dtype)
    # Marked as initialised: not drawn again when the model becomes part of another one.
    references._is_hf_initialized = like.device.type != "meta"  # type: ignore[assignment]
    return references


def _floating(module: nn.Module) -> Tensor:
    """A tensor of the module's device and dtype (of torch's default dtype if it is quantised)."""
    tensors = [*module.parameters(), *module.buffers()]
    wide = (x for x in tensors if x.is_floating_point() and x.element_size() > 1)
    device = tensors[0].device if tensors else None
    return next(wide, torch.empty(0, device=device))


def _size(name: str, module: nn.Module, *attributes: str) -> int:
    for owner in (module, module.config):
        for attribute in attributes:
            size = getattr(owner, attribute, None)
            if isinstance(size, int):
                return size
    raise _refusal(name, f"a module with an int as {' or '.join(attributes)}", "neither")


def _not_recognised(model: PreTrainedModel) -> ValueError:
    return _refusal(
        type(model).__name__,
        "a model whose attention goes through transformers' AttentionInterface",
        "none that is recognised",
    )


def _refusal(name: str, expected: str, got: object) -> ValueError:
    return ValueError(
        f"set_attention: {name} must be {expected}, got {got}; for other models choose "
        'attn_implementation="sdpa" (for parts of a model: a dict by sub-config)'
    )
