"""The grid, experiment × iteration, and the one place that parses its keys."""

from __future__ import annotations

import sys
from typing import NamedTuple

import dagster as dg

from textalign_dagster.experiment.files import Library


class Cell(NamedTuple):
    """One cell of the grid: iteration ``iteration`` (1, 2, …) of an experiment."""

    experiment: str
    iteration: int

    @classmethod
    def of(cls, key: str) -> Cell:
        """Parses ``experiment|001``, a plain string or a MultiPartitionKey."""
        experiment, _, iteration = str(key).rpartition("|")
        return cls(experiment, int(iteration))

    @property
    def key(self) -> dg.MultiPartitionKey:
        """The partition key. Iterations are zero-padded: Dagster orders keys as strings."""
        return dg.MultiPartitionKey(
            {"experiment": self.experiment, "iteration": iteration_key(self.iteration)}
        )

    @property
    def next(self) -> Cell:
        """The same experiment's next iteration."""
        return Cell(self.experiment, self.iteration + 1)


def iteration_key(iteration: int) -> str:
    """``1`` → ``"001"``."""
    return f"{iteration:03d}"


def _grid() -> tuple[dg.MultiPartitionsDefinition, tuple[str, ...], int]:
    library = Library.default()
    good, bad = library.load_all()
    for message in bad.values():  # a broken file must not take the others off the grid
        print(f"textalign: not on the grid: {message}", file=sys.stderr)
    last = max((experiment.iterations for experiment in good.values()), default=1)
    names = tuple(good)
    experiments = dg.StaticPartitionsDefinition(list(names))
    iterations = dg.StaticPartitionsDefinition([iteration_key(k) for k in range(1, last + 1)])
    grid = dg.MultiPartitionsDefinition({"experiment": experiments, "iteration": iterations})
    return grid, names, last


GRID, EXPERIMENTS, LAST_ITERATION = _grid()
