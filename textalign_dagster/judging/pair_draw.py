"""Which pairs of a prompt's samples are compared: all, or a limited number that covers samples evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice

import polars as pl

from textalign_dagster.ids import content_hash

COLUMNS = ("prompt_id", "sample_a", "sample_b")


def sample_pairs(samples: pl.DataFrame, limit: int | None = None) -> pl.DataFrame:
    """Pairs of samples of a prompt: k samples give k(k-1)/2, or ``limit`` of these.

    The choice depends only on the samples' ids: neither the order of the rows nor the other
    prompts matter, and a resumed run draws the same pairs.

    Args:
        samples: sample_id, prompt_id.
        limit: maximum number of pairs per prompt; None: all.

    Returns:
        prompt_id, sample_a, sample_b, with sample_a < sample_b, sorted: which sample is called A
        does not depend on the order of the rows.
    """
    grouped = samples.select("prompt_id", "sample_id").unique().sort("prompt_id", "sample_id")
    rows = [
        (prompt, a, b)
        for prompt, ids in grouped.group_by("prompt_id", maintain_order=True).agg("sample_id").iter_rows()
        for a, b in drawn_pairs(ids, limit)
    ]
    return pl.DataFrame(rows, dict.fromkeys(COLUMNS, pl.String), orient="row")


def drawn_pairs(ids: Sequence[str], limit: int | None) -> list[tuple[str, str]]:
    """Distinct pairs of ids, each pair and the list sorted; pairs per id differ by at most one."""
    if limit is None or limit >= len(ids) * (len(ids) - 1) // 2:
        return list(combinations(sorted(ids), 2))
    # Ids are hashes: hashing them again gives an order unrelated to which sample is called A.
    shuffled = sorted(ids, key=lambda i: content_hash("place in the schedule", i))
    drawn = islice(schedule(len(ids)), limit)
    return sorted((min(a, b), max(a, b)) for a, b in ((shuffled[i], shuffled[j]) for i, j in drawn))


def schedule(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of 0 … count-1, ordered so that after any number of them, all occur equally often (±1)."""
    last = count - 1  # stays fixed while the others rotate
    if count % 2 == 0:
        # A round-robin tournament: everyone plays once per round.
        for turn in range(last):
            yield last, turn
            for step in range(1, count // 2):
                yield (turn + step) % last, (turn - step) % last
        return
    # An odd number cannot pair off. Its pairs decompose into Hamiltonian cycles (Walecki's zigzags); every second
    # edge of a cycle covers each vertex once (the first one twice), and the other edges do so again.
    for turn in range(last // 2):
        zigzag = [(turn + (step + 1) // 2 * (1 if step % 2 else -1)) % last for step in range(last)]
        cycle = [last, *zigzag]
        edges = list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        yield from edges[0::2]
        yield from edges[1::2]
