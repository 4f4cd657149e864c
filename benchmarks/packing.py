"""CPU seconds of a training on padded and on packed rows, in one run.

    python -m benchmarks.packing
    python -m benchmarks.packing --batch 32 --repeats 5 --policy path/to/a/folder

A policy (the embedded one) is trained on synthetic rows with three length distributions, by the trainer
that experiments use; of each the fastest of ``--repeats`` trainings counts, without loading and saving.
Padded rows are sorted into batches of similar length beforehand, as in every experiment, and
``padding`` is what remains. The last distribution is also packed as transformers does by default: one
masked attention over all rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl

from training.data.batches import plan_batches
from training.job import Job
from training.progress import Silent
from training.train import run

POLICY = Path(__file__).parents[1] / "textalign_dagster" / "tasks" / "pep8" / "policy"
LONGEST = 160
SPREADS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "80 to 100 tokens": lambda rng, n: rng.integers(80, 101, n),
    "20 to 160 tokens": lambda rng, n: rng.integers(20, LONGEST + 1, n),
    "long tail, median 40": lambda rng, n: np.clip(rng.lognormal(np.log(40), 0.7, n), 10, LONGEST).astype(
        int
    ),
}


class Stopwatch:
    """CPU seconds spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            result = function(*arguments, **named)
            self.seconds += time.process_time() - started
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=256, help="rows per training")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--policy", type=Path, default=POLICY, help="transformers folder")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name, spread in SPREADS.items():
        lengths = spread(np.random.default_rng(0), options.rows)
        with tempfile.TemporaryDirectory() as folder:
            write_rows(options.policy, lengths, Path(folder) / "rows.parquet")
            kinds = {"padded": (False, "sdpa_row_by_row"), "packed": (True, "sdpa_row_by_row")}
            if name == list(SPREADS)[-1]:
                kinds["one attention"] = (True, "sdpa")
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(options.repeats):
                for kind, (packing, attention) in kinds.items():
                    with mock.patch("training.data.packing.ROW_BY_ROW", attention):
                        spent, tokens = train(Path(folder), packing, options)
                    seconds[kind].append(spent)
        share = 1 - lengths.sum() / computed(lengths, options.batch)
        print(
            f"{name}: {options.rows} rows in steps of {options.batch}, {tokens:,} tokens, {share:.1%} padding"
        )
        for kind, times in seconds.items():
            best = min(times)
            print(
                f"  {kind:14} {best:6.2f} s  {tokens / best:7,.0f} tokens/s  {best / min(seconds['padded']):.2f}"
            )


def computed(lengths: np.ndarray, batch: int) -> int:
    """Tokens of padded rows, including padding."""
    plan = plan_batches(lengths.tolist(), batch_size=batch, accumulation=1, world_size=1, epochs=1, seed=0)
    rows = [ranks[0] for step in plan for ranks in step]
    return sum(len(micro) * int(lengths[micro].max()) for micro in rows)


def write_rows(policy: Path, lengths: np.ndarray, path: Path) -> None:
    """Writes rows of these lengths in tokens: a third prompt, the rest text."""
    piece, count = one_token(policy), len(lengths)
    pl.DataFrame(
        {
            "sample_id": [str(i) for i in range(count)],
            "prompt": [piece * (n // 3) for n in lengths],
            "condition": pl.Series([None] * count, dtype=pl.String),
            "text": [piece * (n - n // 3) for n in lengths],
            "finish_reason": ["length"] * count,
            "n_tokens": lengths,
            "weight": [1.0] * count,
        }
    ).write_parquet(path)


def one_token(policy: Path) -> str:
    """A piece of text that remains one token for the policy, however often it is repeated."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    pieces = (" x", " a", "\n", "x")
    return next(p for p in pieces if len(tokenizer(p * 50, add_special_tokens=False)["input_ids"]) == 50)


def train(folder: Path, packing: bool, options: argparse.Namespace) -> tuple[float, int]:
    """CPU seconds of the steps of a training, and the tokens it read."""
    from training.trainer import ObjectiveTrainer

    job = Job.model_validate(
        {
            "rows": str(folder / "rows.parquet"),
            "policy": str(options.policy),
            "out": str(folder / "out"),
            "threads": options.threads,
            "training": {
                "epochs": 1,
                "batch_size": options.batch,
                "max_length": LONGEST,
                "packing": packing,
            },
        }
    )
    watch = Stopwatch()
    with mock.patch.object(ObjectiveTrainer, "train", watch.around(ObjectiveTrainer.train)):
        done = run(job, Silent())
    return watch.seconds, done["tokens"]


if __name__ == "__main__":
    main()
