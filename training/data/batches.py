"""From examples to batches: the order in which rows are trained on, and how they are laid out as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from training.data.examples import Example
from training.objectives.tokens import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

# Optimizer steps whose rows are sorted by length together. More would save little padding, and lead to
# steps with only one kind of row: rows with the same condition have similar lengths.
GROUP = 8


def plan_batches(
    lengths: Sequence[int],
    groups: Sequence[int | None] | None = None,
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
    steps, whose order is shuffled again. A step's rows depend only on batch_size * accumulation *
    world_size, so the same run can be spread over more processes. A fractional epoch ends early.

    Rows with the same number in ``groups`` (None: the row is alone) share a micro-batch: it then
    holds as many groups as would fit into ``batch_size`` rows if all had the largest size.
    Micro-batches that are left empty in the last step of an epoch hold the first group with
    weight 0: row i as index -1 - i, see ``Examples``.

    Raises:
        ValueError: a group is larger than ``batch_size``.
    """
    members = _members([None] * len(lengths) if groups is None else groups)
    largest = max(map(len, members))
    if largest > batch_size:
        raise ValueError(f"groups of up to {largest} rows are read together; raise batch_size to {largest}")
    per_rank = batch_size // largest
    per_step = per_rank * accumulation * world_size
    sizes = np.asarray([max(lengths[row] for row in rows) for rows in members])
    filler = [-1 - row for row in members[0]]
    plan: list[list[list[list[int]]]] = []
    for epoch in range(math.ceil(epochs)):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(sizes))
        steps = []
        for at in range(0, len(order), GROUP * per_step):
            group = order[at : at + GROUP * per_step]
            group = group[np.argsort(sizes[group], kind="stable")]
            steps += [group[i : i + per_step] for i in range(0, len(group), per_step)]
        steps = [steps[i] for i in generator.permutation(len(steps))]
        if epoch + 1 > epochs:
            steps = steps[: max(1, round((epochs - epoch) * len(steps)))]
        for step in steps:
            spread = _spread(step.tolist(), per_rank, accumulation, world_size)
            plan.append(
                [
                    [[row for unit in part for row in members[unit]] or filler for part in micro]
                    for micro in spread
                ]
            )
    return plan


def _members(groups: Sequence[int | None]) -> list[list[int]]:
    """The rows of each group, in order of first appearance; a row without a group is a group by itself."""
    members: dict[tuple[str, int], list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(("alone", row) if group is None else ("group", group), []).append(row)
    return list(members.values())


def _spread(rows: list[int], batch_size: int, accumulation: int, world_size: int) -> list[list[list[int]]]:
    """Distributes a step's rows, sorted by length, over its micro-batches and ranks."""
    together = batch_size * world_size
    micro_batches = [rows[i * together : (i + 1) * together] for i in range(accumulation)]
    return [[part[rank::world_size] for rank in range(world_size)] for part in micro_batches]


TOKEN_VALUES = ("scores", "reference_log_probs", "second_reference_log_probs")
"""Fields of an example with a number for each token of its text."""


class Examples:
    """The examples as a map-style dataset; index -1 - i is example i with weight 0."""

    def __init__(self, examples: list[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return replace(self._examples[-1 - index], weight=0.0) if index < 0 else self._examples[index]


@dataclass(frozen=True)
class Collator:
    """Examples → a batch of tensors.

    Second contexts are additional rows of the batch or, with ``apart``, separate rows with the prefix
    ``second_``, like those of the reference.

    Returns the fields of ``Sequences`` [B]; ``tokens``, their total number; the ``TOKEN_VALUES`` [N] of all
    labels, if the objective needs them; and for the policy's prompts (with the prefix ``reference_`` for the
    reference's prompts, if these differ) either

    - rows padded on the right: ``input_ids``, ``attention_mask``, ``labels`` [B, T]; ``keep``: the last
      ``keep`` positions contain all labels and the positions that predict them; or
    - ``packed`` rows, concatenated: ``input_ids``, ``position_ids`` [1, T]; ``row_starts``, where rows
      start, and the end of the last; and for each of the N labels its token in ``targets``, its row in
      ``rows`` and the position that predicts it in ``predicts`` [N].
    """

    pad: int
    packed: bool = False
    apart: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        import torch

        form = self._pack if self.packed else self._pad
        seconds = [(i, (e.second, e.text)) for i, e in enumerate(examples) if e.second is not None]
        rows, again = [(e.prompt, e.text) for e in examples], [pair for _, pair in seconds]
        batch: dict[str, Any] = form(rows if self.apart else rows + again)
        if self.apart:
            batch |= {f"second_{key}": value for key, value in form(again).items()}
        elif seconds:
            batch["second_of"] = torch.tensor([i for i, _ in seconds])
        batch["weights"] = torch.tensor([e.weight for e in examples], dtype=torch.float32)
        batch["counted"] = torch.tensor([e.labels for e in examples])
        batch["roles"] = torch.tensor([e.role for e in examples])
        batch["groups"] = torch.tensor([-1 if e.group is None else e.group for e in examples])
        batch["rewards"] = torch.tensor([e.reward for e in examples])
        batch["sampled_log_probs"] = torch.tensor([e.sampled_log_prob for e in examples])
        batch["tokens"] = sum(e.length for e in examples)
        for name in TOKEN_VALUES:
            lists = [getattr(e, name) for e in examples]
            if None not in lists:
                # Without a prompt the first token has no label, and no score either.
                labels = [
                    v
                    for e, values in zip(examples, lists, strict=True)
                    for v in values[len(values) - e.labels :]
                ]
                batch[name] = torch.tensor(labels, dtype=torch.float32)
        referred = [(e.reference, e.text) for e in examples if e.reference is not None]
        if len(referred) == len(examples):
            batch |= {f"reference_{key}": value for key, value in form(referred).items()}
        return batch

    def _pack(self, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        import torch

        row_starts = [0, *accumulate(len(prompt) + len(text) for prompt, text in pairs)]
        # The label at a position is predicted by the position before it, which must be in the same row.
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
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(prompt + text) for prompt, text in pairs]
        labels = [torch.tensor([IGNORE] * len(prompt) + text) for prompt, text in pairs]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
        return {
            "input_ids": input_ids,
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
            "keep": input_ids.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1,
        }
