"""ALT's files before any feedback: prompts, and samples whose prompts include their condition.

In ALT, the condition is part of the text: from iteration 2 on, prompt files were written by hand with the
exemplar in front (``Excellent. input: SUBREDDIT: …``), and sampling files repeat that. Nothing here
guesses where a condition ends. The user gives the template, and a prompt that does not match it is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from textalign_dagster.feedback_files.exported import Exported, exported, write_file
from textalign_dagster.feedback_files.imported import Refusal, Refused, read_text, text_of
from textalign_dagster.feedback_files.json_records import json_lines, json_text
from textalign_dagster.judging.readings import excerpt
from textalign_dagster.pool.conditioning import CONDITION, PROMPT, render
from textalign_dagster.settings import SettingsError

Stage = Literal["prompts", "samples", "feedback"]

PROMPTS = pl.Schema({"prompt": pl.String, "reference": pl.String, "condition": pl.String})
"""Schema of imported prompts; ``condition`` is the text at the template's ``{condition}``, NULL without one."""

_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Conditioned:
    """How a file's prompts include their condition: a template with ``{prompt}`` and optionally ``{condition}``."""

    template: str

    def __post_init__(self) -> None:
        if self.template.count(PROMPT) != 1 or self.template.count(CONDITION) > 1:
            raise SettingsError(
                f"--template {self.template!r}: write {PROMPT} once, and {CONDITION} once or (for one fixed "
                f'condition) not at all, as in "Excellent. input: {PROMPT}"'
            )
        before, after = self.template.split(PROMPT)
        if CONDITION in after or before.endswith(CONDITION):
            raise SettingsError(
                f"--template {self.template!r}: {CONDITION} must come before {PROMPT}, with text between "
                "them that marks where it ends"
            )

    def undo(self, text: str) -> tuple[str | None, str]:
        """The condition (None: the template has no ``{condition}``) and the prompt without it.

        A condition ends where the text after it first occurs.

        Raises:
            Refusal: the text is not a rendering of the template.
        """
        before, after = self.template.split(PROMPT)
        start, named, between = before.partition(CONDITION)
        fits = text.startswith(start) and text.endswith(after) and len(text) > len(start) + len(after)
        inner = text[len(start) : len(text) - len(after)]
        condition, found, prompt = inner.partition(between) if named else (None, True, inner)
        if not fits or not found or condition == "" or not prompt.strip():
            raise Refusal("its prompt does not match --template")
        return condition, prompt


@dataclass(frozen=True)
class ImportedPrompts:
    """The content of a file of prompts.

    Attributes:
        prompts: rows of :data:`PROMPTS`, each prompt once, in the file's order.
        rows: lines in the file.
        refused: lines that were not imported.
        notes: what was read differently from how it is written.
    """

    prompts: pl.DataFrame
    rows: int
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]

    def summary(self, show: int = 3) -> str:
        """What was imported and what was refused, with reasons and examples."""
        lines = [f"{self.rows:,} rows: {self.prompts.height:,} prompts; refused: {len(self.refused):,}"]
        lines += [f"  refused, line {r.line}: {r.reason}: {r.example}" for r in self.refused[:show]]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def alt_text(path: Path) -> str:
    """The text of an ALT file.

    Raises:
        SettingsError: it cannot be read, or is a pickle.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix in _PICKLED or start[:1] == b"\x80" or start == b"PK":
        raise SettingsError(
            f"{path}: is a pickle, and loading one can run arbitrary code, so it is not read. A datapool holds "
            "nothing that is not in the feedback files of its iterations (…_sampling_data_train_split_iter_*.json): "
            "import those"
        )
    return read_text(path)


def alt_stage(path: Path) -> Stage:
    """What an ALT file holds, judging by its fields.

    Raises:
        SettingsError: it cannot be read, is a pickle, or is empty.
    """
    text = alt_text(path)
    if not text.strip():
        raise SettingsError(
            f"{path}: is empty. ALT's concatenation leaves an empty file when shards are missing; import the shards "
            "(…_reward_thread_*.json, …_feedback_subset_*.json) one by one"
        )
    records = [record for _, record in json_lines(text) if isinstance(record, dict)]
    several = [r["generations"] for r in records if isinstance(r.get("generations"), list)]
    if not several:
        return "prompts"
    judged = any(field in record for record in records for field in ("rewards", "feedbacks", "perplexity"))
    return "feedback" if judged or any(isinstance(g, dict) for gs in several for g in gs) else "samples"


def prompt_of(record: Any) -> str:
    """The prompt of a line; RealToxicityPrompts has it as ``prompt.text``.

    Raises:
        Refusal: it has none.
    """
    if not isinstance(record, dict):
        raise Refusal("not a JSON object")
    if isinstance(record.get("prompt"), dict):
        record = {"prompt": record["prompt"].get("text")}
    return text_of(record, "prompt", blank=False)


def read_alt_prompts(path: Path, *, template: str | None = None) -> ImportedPrompts:
    """Reads a file of prompts.

    Args:
        template: how conditions were put before the prompts; None: the prompts are kept unchanged.
    """
    conditioned = Conditioned(template) if template is not None else None
    rows: dict[str, dict[str, str | None]] = {}
    refused: list[Refused] = []
    notes: Counter[str] = Counter()
    lines = 0
    for line, record in json_lines(alt_text(path)):
        lines += 1
        try:
            prompt, condition = prompt_of(record), None
            if conditioned is not None:
                condition, prompt = conditioned.undo(prompt)
            reference = text_of(record, "reference") if record.get("reference") is not None else None
        except Refusal as reason:
            shown = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)
            refused.append(Refused(line, str(reason), excerpt(shown)))
            continue
        if prompt in rows:
            notes["a prompt is repeated; it is kept once"] += 1
        rows.setdefault(prompt, {"prompt": prompt, "reference": reference, "condition": condition})
    counted = tuple(f"{note} ({count:,} ×)" for note, count in notes.items())
    return ImportedPrompts(pl.DataFrame(list(rows.values()), PROMPTS), lines, tuple(refused), counted)


def write_alt_prompts(path: Path, prompts: pl.DataFrame) -> Exported:
    """Writes an ALT prompt file, without conditions; a prompt drawn repeatedly is repeated.

    Args:
        prompts: prompt, and optionally reference.
    """
    names = [name for name in ("prompt", "reference") if name in prompts.columns]
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in prompts.select(names).iter_rows(named=True)
    ]
    write_file(path, json_text(rows))
    return exported(len(rows), Counter())


def write_alt_samples(path: Path, generations: pl.DataFrame, template: str) -> Exported:
    """Writes an ALT sampling file: each prompt as the policy saw it, and its generations.

    Args:
        generations: sample_id, prompt, condition, text.
        template: how the method puts a condition before a prompt.
    """
    lines: dict[str, dict[str, list[str]]] = {}
    for sample, prompt, condition, text in generations.select(
        "sample_id", "prompt", "condition", "text"
    ).iter_rows():
        line = lines.setdefault(render(template, condition, prompt), {"generations": [], "sample_ids": []})
        line["generations"].append(text)
        line["sample_ids"].append(sample)
    write_file(path, json_text({"prompt": prompt, **line} for prompt, line in lines.items()))
    return exported(len(lines), Counter())
