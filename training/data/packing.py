"""Packed rows: the rows of a micro-batch read as one sequence, so that no padding is computed.

Positions restart with every row, and no row attends to another one. transformers derives such a
mask from restarting positions, but over the whole sequence: its cost grows with the square of the
*sum* of the lengths, which costs more than the padding it saves. An architecture whose attention
can be chosen gets ``attend``: its usual attention, row by row.

Not every architecture reads positions, or takes note of where they restart: ``prepare`` tests the
model itself and refuses those that do not.
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
LENGTHS = (6, 9)  # tokens of the rows that a model is tested on


class RowMasks:
    """The mask of a packed sequence; only the rows' own parts are computed.

    What an architecture requires of its masks (e.g. a window) applies to every part.
    """

    def __init__(self, make: Callable[[int, int], Tensor]):
        """``make(start, n)`` returns the mask of the n tokens from ``start`` on, [1, 1, n, n]."""
        self._make = make
        self._parts: dict[tuple[int, int], Tensor | None] = {}

    def part(self, start: int, end: int) -> Tensor | None:
        """The mask [1, 1, n, n] of the tokens from start to end; None: plain causal."""
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
    """The mask that an architecture gets: the same as for ``sdpa``, except for packed sequences."""
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
    """``sdpa`` for each row separately; [1, heads, T, width] each → [1, T, heads, width].

    Args:
        row_starts: where rows start, and the end of the last one; None: there is only one row.
    """
    if not isinstance(attention_mask, RowMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if row_starts is None or kwargs.get("position_bias") is not None:  # a bias spans the whole sequence
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
    """Logits [N, V] at the ``wanted`` positions [N] of a packed sequence [1, T].

    Args:
        bare: the model without its wrappers.
    """
    given: dict[str, Any] = {}
    if bare.config._attn_implementation == ROW_BY_ROW:
        given["row_starts"] = row_starts
    partly = "logits_to_keep" in inspect.signature(bare.forward).parameters
    if partly:
        given["logits_to_keep"] = wanted
    # With a cache, transformers would treat the sequence as one row.
    logits: Tensor = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **given).logits[0]
    return logits if partly else logits[wanted]


def prepare(model: PreTrainedModel, where: str) -> bool:
    """Prepares a model to read packed rows; returns whether its attention runs row by row.

    The model is tested on two short rows: neither may see the other, and both must give the same
    output as on their own.

    Raises:
        JobError: the model does not read packed rows as it reads single ones.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ROW_BY_ROW)  # no effect where it cannot be chosen
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            why = _difference(model)
    except Exception as error:  # noqa: BLE001 (each architecture fails in its own way)
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    model.train(training)
    if getattr(config, "attention_chunk_size", None):
        why = "its attention is cut into chunks, which would be counted from the start of the first row"
    if why is not None:
        raise JobError(
            f"training.packing: {where}: a {type(model).__name__} does not read packed rows as it reads single "
            f"ones ({why}); set it to false"
        )
    return bool(model.config._attn_implementation == ROW_BY_ROW)


def refusal(folder: str) -> str | None:
    """Why policies of this architecture cannot read packed rows, determined before any weights are loaded.

    Two random layers of it are tested; None if they pass, or if the test cannot be run.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config(decoder=True)
        text.num_hidden_layers = min(2, text.num_hidden_layers)
        if vars(text).get("layer_types"):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        text.vocab_size, text.pad_token_id = 64, None
        model = AutoModelForCausalLM.from_config(config)
    except Exception:  # noqa: BLE001 (each architecture fails in its own way; the training itself reports it)
        return None
    try:
        prepare(model, folder)
    except JobError as error:
        return str(error)
    return None


def _difference(model: PreTrainedModel) -> str | None:
    """How a model's output for packed rows differs from that for single ones; None: it does not."""
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
    # Rounding differences grow from layer to layer, and models in double precision compute some parts
    # in single precision. Non-finite weights are detected later.
    rounding = max(torch.finfo(dtype).eps for dtype in (apart.dtype, torch.float32))
    limit = rounding**0.5 * apart.abs().max()
    if (together[split:] - after_another[split:]).abs().max() > limit:
        return "a row sees the row before it"
    if (together - apart).abs().max() > limit:
        return "its positions do not restart"
    return None
