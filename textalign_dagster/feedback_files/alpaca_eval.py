"""AlpacaEval's files: writes a model's outputs and reads annotations of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import polars as pl

from textalign_dagster.feedback_files.exported import Exported, exported, write_file
from textalign_dagster.feedback_files.imported import read_text
from textalign_dagster.feedback_files.json_records import json_list
from textalign_dagster.feedback_files.win_rates import OUTCOMES, Outcomes
from textalign_dagster.prompts import prompt_id
from textalign_dagster.settings import SettingsError

TEXTS = ("instruction", "output_1", "output_2")
"""The texts of an annotation."""


def write_alpaca_eval(path: Path, samples: pl.DataFrame, *, dataset: str, generator: str) -> Exported:
    """Writes a JSON list of ``dataset, instruction, output, generator``, with the first completion of each prompt.

    Args:
        samples: prompt, text; in the order of the evaluation.
        dataset: the name of the prompt set.
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
        left_out["another completion of the same prompt"] = samples.height - first.height
    return exported(len(rows), left_out)


def read_annotations(path: Path) -> Outcomes:
    """Outcomes from ``annotations.json``: ``output_1`` is the reference's, ``output_2`` the model's.

    A ``preference`` from 1 (the reference) to 2 (the model) is the outcome plus 1, so a judge's probabilities are
    kept; 0 is a tie, as in early versions. Rows without a preference are unusable. Of several rows for an
    instruction, the first counts.

    Raises:
        SettingsError: the file cannot be read, or a row is not an annotation.
    """
    rows: dict[str, tuple[str, float, float]] = {}
    items, unusable = set(), 0
    for number, (line, row) in enumerate(json_list(read_text(path), path), start=1):
        texts = [row.get(name) for name in TEXTS] if isinstance(row, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise SettingsError(
                f"{path}:{line}: row {number} is not an AlpacaEval annotation, which has the texts {', '.join(TEXTS)}"
            )
        instruction, reference, answer = map(str, texts)
        key, preference = prompt_id(instruction), row.get("preference")
        items.add(key)
        number_given = isinstance(preference, int | float) and not isinstance(preference, bool)
        if not number_given or not (preference == 0 or 1 <= preference <= 2):  # NaN is neither
            unusable += 1
            continue
        outcome = 0.5 if preference == 0 else preference - 1
        rows.setdefault(key, (key, outcome, float(len(answer) - len(reference))))
    return Outcomes(pl.DataFrame(list(rows.values()), OUTCOMES, orient="row"), len(items), unusable)
