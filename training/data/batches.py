"""From examples to batches: the order in which rows are trained on, and how they lie side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from training.data.examples import Example

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
FILLER = -1  # index of a row that only fills a micro-batch: the first row, with weight 0
# Optimizer steps whose rows are sorted by length together. More saves little padding, and would give
# steps of one kind of row only: rows with the same condition have similar lengths.
GROUP = 8


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    accumulation: int,
    world_size: int,
    epochs: float,
    seed: int,
) -> list[list[list[list[int]]]]:
    """The whole run: ``plan[step][micro_batch][rank]`` is a list of row indices.

    Every epoch visits every row once, in an order drawn from (seed, epoch). Rows of similar length
    share a micro-batch: ``GROUP`` steps' worth of shuffled rows are sorted by length and cut into
    steps, whose order is shuffled again. A step's rows depend on batch_size * accumulation *
    world_size only, so the same run can be spread over more processes. Micro-batches that the
    last step of an epoch cannot fill hold one ``FILLER``. A fractional epoch ends early.
    """
    per_step = batch_size * accumulation * world_size
    sizes = np.asarray(lengths)
    plan: list[list[list[list[int]]]] = []
    for epoch in range(math.ceil(epochs)):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(sizes))
        steps = []
        for at in range(0, len(order), GROUP * per_step):
            group = order[at : at + GROUP * per_step]
            group = group[np.argsort(sizes[group], kind="stable")]
            steps += [group[i : i + per_step] for i in range(0, len(group), per_step)]
        if epoch + 1 > epochs:
            wanted = max(1, round((epochs - epoch) * len(steps)))
            steps = [steps[i] for i in generator.permutation(len(steps))[:wanted]]
        else:
            steps = [steps[i] for i in generator.permutation(len(steps))]
        plan += [_spread(step.tolist(), batch_size, accumulation, world_size) for step in steps]
    return plan


def _spread(rows: list[int], batch_size: int, accumulation: int, world_size: int) -> list[list[list[int]]]:
    """A step's rows, sorted by length, over its micro-batches and ranks."""
    together = batch_size * world_size
    micro_batches = [rows[i * together : (i + 1) * together] for i in range(accumulation)]
    return [[part[rank::world_size] or [FILLER] for rank in range(world_size)] for part in micro_batches]


class RankBatches:
    """The micro-batches of one rank, in order: a batch sampler for a DataLoader."""

    def __init__(self, plan: list[list[list[list[int]]]], rank: int):
        self._batches = [micro_batch[rank] for step in plan for micro_batch in step]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


class Examples:
    """The examples as a map-style dataset; index ``FILLER`` is the first one with weight 0."""

    def __init__(self, examples: list[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return replace(self._examples[0], weight=0.0) if index == FILLER else self._examples[index]


@dataclass(frozen=True)
class Collator:
    """Examples → a batch of tensors.

    Gives ``weights`` [B], ``counted`` [B], the number of a row's labels, and ``tokens``, how many there
    are in all; and of the prompts of the policy, and with the prefix ``reference_`` of those of the
    reference where it reads others, either

    - rows padded on the right: ``input_ids``, ``attention_mask``, ``labels`` [B, T]; ``keep``: the last
      ``keep`` positions hold all labels and what predicts them; or
    - ``packed`` rows, one after the other: ``input_ids``, ``position_ids`` [1, T]; ``row_starts``, where
      rows begin, and the end of the last; and of each of the N labels its token in ``targets``, its row
      in ``rows`` and what predicts it in ``predicts`` [N].
    """

    pad: int
    packed: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        import torch

        form = self._pack if self.packed else self._pad
        batch: dict[str, Any] = form([(e.prompt, e.text) for e in examples])
        batch["weights"] = torch.tensor([e.weight for e in examples], dtype=torch.float32)
        # Nothing predicts the first token of a sequence.
        batch["counted"] = torch.tensor([len(e.text) - (not e.prompt) for e in examples])
        batch["tokens"] = sum(e.length for e in examples)
        if all(e.reference is not None for e in examples):
            other = form([(e.reference or [], e.text) for e in examples])
            batch |= {f"reference_{name}": value for name, value in other.items()}
        return batch

    def _pack(self, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        import torch

        row_starts = [0, *accumulate(len(prompt) + len(text) for prompt, text in pairs)]
        # The label at a position is predicted by the position before it, which must be of the same row.
        labels = [
            (row, at)
            for row, ((prompt, _), (start, end)) in enumerate(zip(pairs, pairwise(row_starts), strict=True))
            for at in range(start + max(1, len(prompt)), end)
        ]
        tokens = torch.tensor([token for prompt, text in pairs for token in (*prompt, *text)])
        rows, at = torch.tensor(labels, dtype=torch.long).reshape(-1, 2).unbind(1)
        return {
            "input_ids": tokens[None],
            "position_ids": torch.cat([torch.arange(end - start) for start, end in pairwise(row_starts)])[
                None
            ],
            "row_starts": row_starts,
            "targets": tokens[at],
            "rows": rows,
            "predicts": at - 1,
        }

    def _pad(self, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Tensor | int]:
        import torch

        width = max(len(prompt) + len(text) for prompt, text in pairs)
        shape = (len(pairs), width)
        input_ids = torch.full(shape, self.pad, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        for row, (prompt, text) in enumerate(pairs):
            end = len(prompt) + len(text)
            input_ids[row, :end] = torch.tensor(prompt + text)
            attention_mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(text)
        keep = width - min(len(prompt) for prompt, _ in pairs) + 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "keep": keep,
        }
