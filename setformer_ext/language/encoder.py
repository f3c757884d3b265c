"""The SeTformer language encoder, without a task's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from ..controls import MeanAttention, SoftmaxAttention, make_attention
from ..modules import SetAttention, zero_padding
from .configuration import ATTENTION_OPTIONS, SetformerConfig
from .masks import valid_tokens


class SetformerEmbeddings(nn.Module):
    """Words, segments and, if there are any, absolute positions: added, normed, dropped out.

    Shape:
        input_ids and token_type_ids [B, N] int64 to [B, N, C].
    """

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        longest = config.max_position_embeddings
        self.position_embeddings = None if longest is None else nn.Embedding(longest, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        words: Tensor,  # [B, N, C]
        token_type_ids: Tensor | None,  # [B, N]
        position_ids: Tensor | None,  # [B, N] or [1, N]
    ) -> Tensor:  # [B, N, C]
        if token_type_ids is None:
            words = words + self.token_type_embeddings.weight[0]
        else:
            words = words + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            length, longest = words.shape[1], self.position_embeddings.num_embeddings
            if length > longest:
                raise ValueError(
                    f"Setformer: input_ids must have at most max_position_embeddings={longest} "
                    f"tokens, got {length}; cut the text, or use a model without them"
                )
            if position_ids is None:
                position_ids = torch.arange(length, device=words.device).unsqueeze(0)
            words = words + self.position_embeddings(position_ids)
        return self.dropout(self.norm(words))


class TokenConvolution(nn.Module):
    """A depthwise convolution over the sequence, for which padding is 0.

    Shape:
        x [B, N, C] to [B, N, C].
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.conv(zero_padding(x, mask).transpose(1, 2)).transpose(1, 2)


class SetformerLayer(GradientCheckpointingLayer):
    """Order by a depthwise convolution, then pre-norm attention and pre-norm MLP, all added.

    Shape:
        x [B, N, C] and mask [B, N] bool (True = valid) or None to [B, N, C].
    """

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        kernel_size = config.conv_kernel_size
        self.position = TokenConvolution(width, kernel_size) if kernel_size else None
        options = ATTENTION_OPTIONS | (config.attention_options or {})
        attention = make_attention(config.attention, width, heads, config.num_references, options)
        self.attends = attention is not None
        if attention is not None:
            self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
            self.attention = attention
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)
        hidden: Any = config.intermediate_size  # an int, whatever was given
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), ACT2FN[config.hidden_act], nn.Linear(hidden, width)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.position is not None:
            x = x + self.position(x, mask)
        if self.attends:
            x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class SetformerPreTrainedModel(PreTrainedModel):
    """What all SeTformer language models share: configuration, initialisation, checkpointing."""

    config_class = SetformerConfig
    base_model_prefix = "setformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SetformerLayer"]
    _input_embed_layer = "word_embeddings"  # of SetformerModel.embeddings

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TokenConvolution):  # small, so that its input comes through the sum
            initialization.normal_(module.conv.weight, std=self.config.initializer_range)
            if module.conv.bias is not None:
                initialization.zeros_(module.conv.bias)
        elif isinstance(module, SetAttention | SoftmaxAttention | MeanAttention):
            # While transformers initialises, its torch.nn.init leaves loaded parameters as they
            # are.
            module.reset_parameters()
            # Branches that start large hide the words for hundreds of steps.
            for name in ("key", "query", "value", "query_key_value", "projection"):
                linear = getattr(module, name, None)
                if linear is not None:
                    super()._init_weights(linear)
            if isinstance(module, SetAttention):
                module.start_queries_as_keys()
        else:
            super()._init_weights(module)


class SetformerModel(SetformerPreTrainedModel):
    """The encoder: token embeddings to contextual ones, of texts of any length.

    Attention costs O(N M) for N tokens and M references, in time and memory.

    From the paper (Shamsolmoali et al., SeTformer, AAAI 2024): SeT attention in a language encoder
    that is evaluated on GLUE. Widths, depths, references, the convolution that tells the order of
    words and every option of the attention are our reading.
    """

    def __init__(self, config: SetformerConfig) -> None:
        super().__init__(config)
        self.embeddings = SetformerEmbeddings(config)
        self.layers = nn.ModuleList(SetformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        token_type_ids: Tensor | None = None,  # [B, N]
        position_ids: Tensor | None = None,  # [B, N]
        inputs_embeds: Tensor | None = None,  # [B, N, C]
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode a batch of token sequences.

        Args:
            input_ids: tokens [B, N], int64.
            attention_mask: [B, N], nonzero = valid or, where none is above 0, an additive one,
                0 = valid (integers that are all 0 are all padding); padding neither gives nor
                changes anything.
            token_type_ids: segments [B, N], by default all 0.
            position_ids: places [B, N], by default 0 ... N - 1; matters to absolute positions.
            inputs_embeds: embeddings [B, N, C] in place of ``input_ids``.
            output_hidden_states: return what goes into every layer as well, and the last norm's.

        Returns:
            ``last_hidden_state`` [B, N, C] and ``hidden_states``, where asked for.

        Raises:
            ValueError: for none or both of input_ids and inputs_embeds, another shape of the mask,
                or sequences longer than the model's absolute positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Setformer: expected either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError(
                "Setformer: output_attentions must be False, for there is no N x N matrix; "
                "SetAttention.transport_plan gives that of tokens and references"
            )
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != words.shape[:2]:
                raise ValueError(
                    f"Setformer: attention_mask must be [B, N] = {list(words.shape[:2])}, "
                    f"got {list(attention_mask.shape)}"
                )
            mask = valid_tokens(attention_mask)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(words, token_type_ids, position_ids)
        states = [x]
        for layer in self.layers:
            x = layer(x, mask)
            states.append(x)
        states[-1] = x = self.norm(x)
        return BaseModelOutput(
            last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None
        )
