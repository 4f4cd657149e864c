"""Batched decoding with any transformers causal LM: each prompt is prefilled once for all its samples.

Why not ``model.generate``: it grows the cache by concatenation (nearly half of its run time with a
small model), prefills a prompt once for each of its samples, keeps finished rows until the last one
ends, and draws all rows from one random stream, so a sample depends on its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from resources.engines.text import Drawn
from resources.engines.transformers.token_choice import draw, truncate, uniforms

COMPACT_BELOW = 0.85  # share of rows still alive below which compacting the cache is cheaper than keeping it


class NotFiniteError(ValueError):
    """The model's logits are NaN or infinite: its weights have diverged."""


@dataclass(frozen=True)
class Rule:
    """`sampler.Decoding` with token ids in place of strings."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    min_new_tokens: int
    end_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one attention layer in a buffer (rows, heads, capacity, head size)."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new positions; returns views of everything written so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = self._buffer(key_states, len(key_states))
            self.values = self._buffer(value_states, len(value_states))
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select, repeat and reorder rows; a changed capacity takes effect here."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer(old, len(beam_idx))
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, beam_idx)
            setattr(self, name, new)

    def _buffer(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty((rows, like.shape[1], self.capacity, like.shape[3]))


def new_cache(config: Any, capacity: int) -> Cache:
    """A cache for a model, with its full-attention layers preallocated; other layers are unchanged."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = PreallocatedLayer(capacity)
    return cache


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int],
    seeds: Sequence[int],
    rule: Rule,
    on_step: Callable[[float], None] = lambda finished: None,
) -> list[Drawn]:
    """One completion for each seed: row i continues ``prompts[owners[i]]`` with ``seeds[i]``.

    Prompts are non-empty lists of token ids; prompt + max_new_tokens must fit the model's context.
    ``on_step`` receives the number of finished completions, with those in flight counted pro rata.
    Raises `NotFiniteError`.
    """
    device = model.device
    forward = _forward(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    capacity = width + rule.max_new_tokens - 1

    # Left padding: the last position of every row is its prompt's last token.
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    seen = torch.zeros((len(prompts), capacity), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        seen[row, width - len(prompt) :] = 1
    padded = bool(lengths.min() < width)
    positions = (seen[:, :width].cumsum(-1) - 1).clamp(min=0)
    ids, seen, positions, lengths = (t.to(device) for t in (ids, seen, positions, lengths))

    cache: Any = new_cache(model.config, width)
    logits = forward(ids, seen[:, :width] if padded else None, positions, cache)

    # From here on, a row is a completion; the samples of a prompt share its prefill.
    owner = torch.tensor(owners, device=device)
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            layer.capacity = capacity
    cache.reorder_cache(owner)
    logits, seen, position = logits[owner], seen[owner], lengths[owner]

    total = len(seeds)
    numbers = uniforms(seeds, rule.max_new_tokens if rule.temperature else 0).to(device)
    tokens = torch.zeros((total, rule.max_new_tokens), dtype=torch.long, device=device)
    counts = torch.full((total,), rule.max_new_tokens, device=device)
    ended = torch.zeros(total, dtype=torch.bool, device=device)
    logprobs = torch.zeros(total, dtype=torch.float64, device=device)
    end_ids = torch.tensor(rule.end_ids, dtype=torch.long, device=device)
    banned = torch.tensor(rule.banned_ids, dtype=torch.long, device=device)
    banned_early = torch.cat([banned, end_ids])

    rows = torch.arange(total, device=device)  # the completion each row of the batch belongs to
    alive = torch.ones(total, dtype=torch.bool, device=device)
    finished = 0
    for step in range(rule.max_new_tokens):
        normaliser = logits.logsumexp(-1)
        if not bool(normaliser.isfinite().all()):
            raise NotFiniteError(f"logits are not finite at new token {step + 1}")
        forbidden = banned_early if step < rule.min_new_tokens else banned
        scores = logits.index_fill(-1, forbidden, -torch.inf) if len(forbidden) else logits
        if rule.temperature == 0:
            chosen = scores.argmax(-1)
        else:
            scores = scores / rule.temperature if rule.temperature != 1 else scores
            chosen = draw(truncate(scores, rule.top_k, rule.top_p), numbers[rows, step])

        tokens[rows, step] = chosen
        gained = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - normaliser
        logprobs[rows] += torch.where(alive, gained, 0.0).double()
        ends = torch.isin(chosen, end_ids) & alive
        ended[rows] |= ends
        counts[rows[ends]] = step + 1
        alive = alive & ~ends
        left = int(alive.sum())
        finished = total - left
        on_step(finished + left * (step + 1) / rule.max_new_tokens)
        if left == 0 or step + 1 == rule.max_new_tokens:
            break

        if left <= COMPACT_BELOW * len(rows):
            keep = alive.nonzero().squeeze(-1)
            cache.reorder_cache(keep)
            rows, alive, seen, position = rows[keep], alive[keep], seen[keep], position[keep]
            chosen = chosen[keep]
        logits = forward(
            chosen.unsqueeze(-1),
            seen[:, : width + step + 1] if padded else None,
            position.unsqueeze(-1),
            cache,
        )
        position = position + 1

    kept = zip(tokens.tolist(), counts.tolist(), ended.tolist(), logprobs.tolist(), strict=True)
    return [Drawn(ids[:count], end, logprob) for ids, count, end, logprob in kept]


@torch.inference_mode()
def score(model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[float]:
    """log p(text | prompt) in nats for each pair of non-empty token id lists, in one batch.

    Padding is on the right, where a causal model does not see it. Raises `NotFiniteError`.
    """
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    first = min(len(prompt) for prompt in prompts) - 1  # no text token is predicted before this
    width = max(len(row) for row in rows) - 1  # the last token predicts nothing
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    target = torch.zeros((len(rows), width), dtype=torch.long)
    counted = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[index, : len(row) - 1] = torch.tensor(row[:-1])
        target[index, : len(row) - 1] = torch.tensor(row[1:])
        counted[index, len(prompt) - 1 : len(row) - 1] = True
    ids, target, counted = (t.to(model.device) for t in (ids, target, counted))

    options: dict[str, Any] = {}
    if "logits_to_keep" in _parameters(model):
        options["logits_to_keep"] = torch.arange(first, width, device=model.device)
    logits = model(input_ids=ids, use_cache=False, **options).logits[:, first - width :].float()
    target, counted = target[:, first:], counted[:, first:]
    gained = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    sums = torch.where(counted, gained, 0.0).double().sum(-1)
    if not bool(sums.isfinite().all()):
        raise NotFiniteError("logits are not finite")
    return sums.tolist()


def batches(sizes: Sequence[int], costs: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in batches of similar cost, the most expensive first, each of total size <= limit.

    An item larger than the limit gets its own batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-costs[i], i)):
        if batch and sum(sizes[i] for i in batch) + sizes[index] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _forward(model: Any) -> Callable[[Tensor, Tensor | None, Tensor, Cache], Tensor]:
    """A function that runs the model and returns float32 logits (rows, vocabulary) of the last position."""
    known = _parameters(model)
    fixed: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in known:
        fixed["logits_to_keep"] = 1
    takes_positions = "position_ids" in known  # e.g. ALiBi models use the mask instead

    def forward(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        options = {**fixed, "position_ids": positions} if takes_positions else fixed
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    return forward
