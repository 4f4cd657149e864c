"""AlpacaEval's file of a model's outputs: JSON, one of `dataset, instruction, output, generator` a prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import polars as pl

from textalign_dagster.judging.exported import Exported, exported, write_file


def write_alpaca_eval(path: Path, samples: pl.DataFrame, *, dataset: str, generator: str) -> Exported:
    """Writes the first completion of each prompt; the format holds one a model.

    Args:
        samples: prompt, text; in the order of the evaluation.
        dataset: the name of the prompts' set.
        generator: the name of the model.
    """
    first = samples.unique("prompt", keep="first", maintain_order=True)
    rows = [
        {"dataset": dataset, "instruction": prompt, "output": text, "generator": generator}
        for prompt, text in first.select("prompt", "text").iter_rows()
    ]
    write_file(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
    left_out = Counter[str]()
    if samples.height > first.height:
        left_out["a further completion of its prompt"] = samples.height - first.height
    return exported(len(rows), left_out)
