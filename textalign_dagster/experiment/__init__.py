"""An experiment: its YAML file, its prompts, its models, what its evaluation asks.

From outside: `Experiment` from here; `files`, `sources`, `policies`, `evaluation`.
"""

from textalign_dagster.experiment.experiment import Experiment

__all__ = ["Experiment"]
