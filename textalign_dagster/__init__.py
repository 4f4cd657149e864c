"""Aligns language models from textual feedback, iteration by iteration, as Dagster assets."""

__version__ = "0.1.0"
