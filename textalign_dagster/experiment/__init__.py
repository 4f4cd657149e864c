"""An experiment: its YAML file, its prompts, its models, its evaluation.

Import `Experiment` from here; `files`, `sources`, `policies` and `evaluation` are public, too.
"""

from textalign_dagster.experiment.experiment import Experiment

__all__ = ["Experiment"]
