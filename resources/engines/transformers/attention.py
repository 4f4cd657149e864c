"""Attention for decoding on a CPU: one query per row, as two matrix products.

PyTorch's fused CPU kernel is optimised for many queries; with a single one it is about a quarter slower
than the plain products, and it needs grouped keys repeated in memory for each query head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "textalign_decode"
PLAIN = {"scaling", "dropout", "position_ids", "use_cache", "is_causal"}  # no effect with a single query


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of queries (rows, heads, queries, size) over keys and values (rows, key heads,
    positions, size), with a Boolean mask (rows, 1, queries, positions) of the positions to attend to.

    More than one query, or an unknown option, falls back to PyTorch's kernel.
    """
    extras = {name for name, option in options.items() if option is not None} - PLAIN
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if query.shape[2] != 1 or extras or not boolean:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, heads, _, size = query.shape
    groups = key.shape[1]
    scaling = options.get("scaling")
    query = query * (size**-0.5 if scaling is None else scaling)
    # The query heads of a group are the rows of its product: (rows, groups, heads in group, size).
    scores = query.view(rows, groups, heads // groups, size) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    out = scores.softmax(-1) @ value
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def install(model: Any) -> None:
    """Make a model that uses PyTorch's kernel decode with this function instead."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, decode_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
