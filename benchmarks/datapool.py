"""Time and memory of the datapool on synthetic rows.

    python -m benchmarks.datapool --prompts 2048 --samples 96 --iterations 10
    python -m benchmarks.datapool --prompts 2048 --samples 96 --iterations 1 --published

``--published`` also times a plain implementation of the published procedure (a dictionary of lists
per prompt, one scan per label, ``x not in list``) and prints how many times as long it takes. It gets
the token counts and returns only the drawn samples: the released code tokenises every text of the
pool again, which is not counted here, and does not record which rows were not drawn, nor why.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl

from textalign_dagster.pool.datapool import build_pool, drop_earlier
from textalign_dagster.pool.quantiles import QuantileSettings, quantile_labels
from textalign_dagster.pool.row_order import canonical_order
from textalign_dagster.settings.pool import PoolSettings

LABELS = ("Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible.")
LIMIT = 64


def make_rows(prompts: int, samples: int, iterations: int, seed: int) -> pl.DataFrame:
    """prompts x samples x iterations rows in random order, every prompt in every iteration."""
    rng = np.random.default_rng(seed)
    n = prompts * samples * iterations
    prompt = np.tile(np.repeat(np.arange(prompts), samples), iterations)
    rows = pl.DataFrame(
        {
            "bits": rng.integers(0, 2**63, n),
            "prompt": prompt,
            "origin": np.repeat(np.arange(1, iterations + 1), prompts * samples),
            "position": np.tile(np.arange(prompts * samples), iterations),
            "value": rng.normal(size=n),
            "n_tokens": rng.integers(20, LIMIT + 1, n),
        }
    )
    hexadecimal = pl.Series([f"{b:016x}{i:08x}" for i, b in enumerate(rows["bits"].to_list())])
    return rows.select(
        hexadecimal.alias("sample_id"),
        pl.format("prompt {}", "prompt").alias("prompt_id"),
        "origin",
        "position",
        "value",
        pl.lit(None, pl.String).alias("condition"),
        "n_tokens",
        pl.lit("ok").alias("status"),
    )[rng.permutation(n)]


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a step, print it with CPU time and the process's peak memory so far, and store it in ``seconds``."""
    start, start_cpu = time.perf_counter(), time.process_time()
    yield
    seconds[step] = time.perf_counter() - start
    cpu = time.process_time() - start_cpu
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"{step:<44} {seconds[step]:8.2f} s   cpu {cpu:8.2f} s   peak {peak:7.0f} MiB", flush=True)


def published(rows: pl.DataFrame, settings: PoolSettings, seed: int) -> int:
    """The published procedure on one iteration's rows, prompt by prompt; returns the number of samples drawn."""
    rng = random.Random(seed)
    pool: dict[str, list[tuple[str, float, int]]] = defaultdict(list)
    columns = rows.select("prompt_id", "sample_id", "value", "n_tokens")
    for prompt, sample, value, tokens in columns.iter_rows():
        pool[prompt].append((sample, value, tokens))
    drawn = 0
    for own in pool.values():
        own.sort(key=lambda item: item[1], reverse=True)
        size = len(own) // len(LABELS)
        quantiles = [LABELS[min(i // size, 4)] if size else LABELS[-1] for i in range(len(own))]
        drawn += len(_chosen(own, quantiles, settings, rng))
    return drawn


def _take(bucket: list[tuple[str, float, int]], want: int, rng: random.Random) -> list[str]:
    """Shuffle, take samples that are not over-long, and top up with those that are."""
    rng.shuffle(bucket)
    taken = [sample for sample, _, tokens in bucket if tokens < LIMIT][:want]
    rest = [sample for sample, _, _ in bucket if sample not in taken]
    return taken + rest[: want - len(taken)]


def _chosen(
    own: list[tuple[str, float, int]],
    quantiles: list[str],
    settings: PoolSettings,
    rng: random.Random,
) -> list[str]:
    """As many samples of each label, or in total, as the settings draw."""
    wanted = settings.samples
    share = (settings.samples_per_bucket or 0) if wanted is None else wanted // len(LABELS)
    taken: list[str] = []
    for label in LABELS:
        bucket = [item for item, own_label in zip(own, quantiles, strict=True) if own_label == label]
        taken += _take(bucket, share, rng)
    if wanted is None:
        return taken
    rest = [sample for sample, _, _ in own if sample not in taken]
    return taken + rest[: wanted - len(taken)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2048, help="prompts per iteration (2048)")
    parser.add_argument("--samples", type=int, default=96, help="samples per prompt (96)")
    parser.add_argument("--iterations", type=int, default=5, help="iterations in the pool (5)")
    parser.add_argument("--rows", type=int, help="approximate number of rows; sets --iterations")
    parser.add_argument("--draw", choices=("per-bucket", "samples"), default="per-bucket")
    parser.add_argument("--drop-factor", type=float, default=0.0, help="0 keeps all rows (0)")
    parser.add_argument("--published", action="store_true", help="time the published procedure too")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    iterations = given.iterations
    if given.rows is not None:
        iterations = max(1, round(given.rows / (given.prompts * given.samples)))
    limit = {"samples_per_bucket": 2} if given.draw == "per-bucket" else {"samples": 8}
    settings = PoolSettings.model_validate({"drop_factor": given.drop_factor, "max_tokens": LIMIT} | limit)
    seconds: dict[str, float] = {}
    with timed("make rows (not part of the pool)", seconds):
        rows = make_rows(given.prompts, given.samples, iterations, given.seed)
    print(f"{rows.height:,} rows, {given.prompts:,} prompts, {iterations} iterations")
    with timed("canonical order", seconds):
        canonical_order(rows)
    with timed("quantile labels, order included", seconds):
        quantile_labels(rows, LABELS)
    with timed("drop half of the earlier, order included", seconds):
        drop_earlier(rows, 0.5, given.seed, current=iterations)
    with timed("whole pool: order, drop, quantiles, draw", seconds):
        pool = build_pool(
            rows,
            settings,
            current=iterations,
            labels=LABELS,
            seed=given.seed,
            pool_hash="benchmark",
            quantiles=QuantileSettings(),
        )
    print(f"drawn {pool.drawn:,} of {pool.wanted:,} wanted")
    if given.published:
        with timed("published procedure, lists and loops", seconds):
            drawn = published(rows, settings, given.seed)
        ratio = (
            seconds["published procedure, lists and loops"]
            / seconds["whole pool: order, drop, quantiles, draw"]
        )
        print(f"drawn {drawn:,}; {ratio:.1f} times as long as the whole pool")
    return 0


if __name__ == "__main__":
    sys.exit(main())
