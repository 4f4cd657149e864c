"""Packed rows: the rows of a micro-batch read as one sequence, so that no padding is computed.

Positions begin anew with every row, and no row attends to another one. transformers makes such a
mask of positions that begin anew, over the whole sequence: its cost grows with the square of the
*sum* of the lengths, which is dearer than the padding it saves. Where an architecture lets its
attention be chosen it gets ``attend``: the attention that it has otherwise, row by row.

Not every architecture reads positions, or minds where they begin anew: ``prepare`` tries it out on
the model itself and refuses those that do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.job import JobError

ROW_BY_ROW = "sdpa_row_by_row"
LENGTHS = (6, 9)  # tokens of the rows that a model is tried on


class RowMasks:
    """The mask of a packed sequence, of which no more than the rows' own parts is computed.

    What an architecture asks of its masks (a window, say) is asked of every part.
    """

    def __init__(self, make: Callable[[int, int], Tensor]):
        """``make``: the mask of the n tokens from a position on, [1, 1, n, n]."""
        self._make = make
        self._parts: dict[tuple[int, int], Tensor | None] = {}

    def part(self, start: int, end: int) -> Tensor | None:
        """[1, 1, n, n] of the tokens from start to end; None: each sees all before it."""
        if (start, end) not in self._parts:
            n = end - start
            mask = self._make(start, n)
            causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
            # Without a mask, faster kernels do the same.
            self._parts[start, end] = None if torch.equal(mask[0, 0], causal) else mask
        return self._parts[start, end]


def masks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> RowMasks | Tensor | None:
    """What an architecture is given as mask: as for ``sdpa``, but for packed sequences."""
    if attention_mask is None and batch_size == 1 and not allow_is_causal_skip and q_length == kv_length:
        whole = kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

        def make(start: int, n: int) -> Tensor:
            mask = sdpa_mask(1, n, n, start, start, **whole)
            assert mask is not None
            return mask

        return RowMasks(make)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMasks | Tensor | None,
    row_starts: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``sdpa`` for every row by itself; [1, heads, T, width] of each → [1, T, heads, width].

    Args:
        row_starts: where rows begin, and the end of the last one; None: there is one row.
    """
    if not isinstance(attention_mask, RowMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if row_starts is None or kwargs.get("position_bias") is not None:  # which is of the whole sequence, too
        row_starts = [0, query.shape[2]]
    rows = list(pairwise(row_starts))
    # Split, not sliced: the gradient of a slice is as long as the whole sequence.
    parts = zip(
        *(x.split([end - start for start, end in rows], dim=2) for x in (query, key, value)), strict=True
    )
    outputs = [
        sdpa_attention_forward(module, q, k, v, attention_mask.part(start, end), **kwargs)[0]
        for (start, end), (q, k, v) in zip(rows, parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(ROW_BY_ROW, attend)
AttentionMaskInterface.register(ROW_BY_ROW, masks)


def packed_logits(
    model: Any, bare: Any, input_ids: Tensor, position_ids: Tensor, row_starts: list[int], wanted: Tensor
) -> Tensor:
    """Logits [N, V] at the wanted positions [N] of a packed sequence [1, T].

    Args:
        bare: the architecture itself, without what is wrapped around it.
    """
    given: dict[str, Any] = {}
    if bare.config._attn_implementation == ROW_BY_ROW:
        given["row_starts"] = row_starts
    partly = "logits_to_keep" in inspect.signature(bare.forward).parameters
    if partly:
        given["logits_to_keep"] = wanted
    # With a cache, transformers would take the sequence for one row.
    logits: Tensor = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **given).logits[0]
    return logits if partly else logits[wanted]


def prepare(model: PreTrainedModel, where: str) -> bool:
    """Lets a model read packed rows; returns whether its attention goes row by row.

    The model is tried on two short rows: neither may see the other, and both must come out as they
    do alone.

    Raises:
        JobError: it does not read packed rows as it reads single ones.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ROW_BY_ROW)  # where it cannot be chosen, it stays
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            why = _difference(model)
    except Exception as error:  # noqa: BLE001 (each architecture fails in its own way)
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    model.train(training)
    if getattr(config, "attention_chunk_size", None):
        why = "its attention is cut into chunks, which would be counted from the first row"
    if why is not None:
        raise JobError(
            f"training.packing: {where}: a {type(model).__name__} does not read several rows in one sequence as "
            f"it reads them alone ({why}); set it to false"
        )
    return bool(model.config._attn_implementation == ROW_BY_ROW)


def refusal(folder: str) -> str | None:
    """Why policies of this architecture cannot read packed rows, found before any weights are loaded.

    It is tried on two random layers of it; None also where this does not show it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config(decoder=True)
        text.num_hidden_layers = min(2, text.num_hidden_layers)
        if vars(text).get("layer_types"):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        text.vocab_size, text.pad_token_id = 64, None
        model = AutoModelForCausalLM.from_config(config)
    except Exception:  # noqa: BLE001 (each architecture has its own way; the training itself will tell)
        return None
    try:
        prepare(model, folder)
    except JobError as error:
        return str(error)
    return None


def _difference(model: PreTrainedModel) -> str | None:
    """What a model makes of packed rows that it does not make of single ones; None: nothing."""
    embeddings = cast(Tensor, model.get_input_embeddings().weight)
    device, vocabulary = embeddings.device, embeddings.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (n,), generator=generator).to(device) for n in LENGTHS)
    other = (first + vocabulary // 2) % vocabulary
    split = len(first)

    def packed(*rows: Tensor) -> Tensor:
        starts = [0, split, split + len(second)]
        positions = torch.cat([torch.arange(len(row), device=device) for row in rows])
        every = torch.arange(starts[-1], device=device)
        return packed_logits(model, model, torch.cat(rows)[None], positions[None], starts, every)

    def alone(row: Tensor) -> Tensor:
        ones = torch.ones_like(row)[None]
        logits: Tensor = model(input_ids=row[None], attention_mask=ones, use_cache=False).logits[0]
        return logits

    together, after_another = packed(first, second), packed(other, second)
    apart = torch.cat([alone(first), alone(second)])
    # Differences of rounding, which grow from layer to layer, and are of single precision in parts of
    # models in double precision. Weights that are not finite are found later.
    rounding = max(torch.finfo(dtype).eps for dtype in (apart.dtype, torch.float32))
    limit = rounding**0.5 * apart.abs().max()
    if (together[split:] - after_another[split:]).abs().max() > limit:
        return "a row sees the row before it"
    if (together - apart).abs().max() > limit:
        return "its positions do not begin anew"
    return None
