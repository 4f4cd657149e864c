"""Aligns language models from textual feedback, iteration by iteration, as Dagster assets."""

__version__ = "0.1.0"

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
"""The project's root folder, which holds its packages."""
