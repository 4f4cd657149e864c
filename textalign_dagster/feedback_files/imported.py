"""The result of an import: samples, feedback, pairs, and every row that was refused, with its line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.ids import content_hash
from textalign_dagster.judging.pairs import PAIRS, oriented
from textalign_dagster.judging.readings import excerpt, mended
from textalign_dagster.prompts import prompt_id
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import FEEDBACK

SAMPLES = pl.Schema(
    {
        "sample_id": pl.String,  # key: the file's own, or a hash of prompt, text and occurrence
        "prompt_id": pl.String,
        "prompt": pl.String,
        "text": pl.String,
        "reference": pl.String,  # a better answer, where the file has one
    }
)


@dataclass(frozen=True)
class Refused:
    """A row that was not imported: its line, the reason, and how it begins."""

    line: int
    reason: str
    example: str


@dataclass(frozen=True)
class Imported:
    """The content of a file. Failed judgements are rows too, with their status.

    Attributes:
        samples: rows of :data:`SAMPLES`.
        feedback: rows of FEEDBACK.
        pairs: rows of PAIRS.
        pairs_as_read: the same with the two samples in the order of the file.
        identical: pairs of two identical texts, which are refused: sample id, prompt id and winner.
        rows: rows (or records) in the file.
        refused: those in none of the frames.
        notes: what was read differently from how it is written.
    """

    samples: pl.DataFrame
    feedback: pl.DataFrame
    pairs: pl.DataFrame
    rows: int
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]
    pairs_as_read: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=PAIRS))
    identical: tuple[tuple[str, str, str | None], ...] = ()

    def summary(self, show: int = 3) -> str:
        """What was imported and what was refused, with reasons, counts and examples."""
        judged = Counter([*self.feedback["status"], *self.pairs["status"]])
        states = ", ".join(f"{count:,} {status}" for status, count in judged.most_common()) or "none"
        lines = [
            f"{self.rows:,} rows: {self.samples.height:,} samples; judgements: {states}; "
            f"refused: {len(self.refused):,}"
        ]
        for reason, count in Counter(r.reason for r in self.refused).most_common():
            where = [r for r in self.refused if r.reason == reason][:show]
            examples = "; ".join(f"line {r.line}: {r.example}" for r in where)
            lines.append(f"  refused, {count:,} × {reason} ({examples}{'; …' if count > show else ''})")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def of_aspect(rows: pl.DataFrame, aspect: str | None, path: str | Path) -> pl.DataFrame:
    """The judgements of one aspect: the named one, or the only one.

    Args:
        rows: of FEEDBACK or PAIRS.
        path: the file they are from, for errors.

    Raises:
        ValueError: there are several and none is named, or the named one is missing.
    """
    aspects = sorted(rows["aspect"].unique())
    if aspect is None and len(aspects) > 1:
        raise ValueError(f"{path} has the aspects {', '.join(aspects)}; choose one with `aspect`")
    if aspect is not None and aspects and aspect not in aspects:
        raise ValueError(f"{path} has no aspect {aspect!r}; it has: {', '.join(aspects)}")
    return rows if aspect is None else rows.filter(aspect=aspect)


class Refusal(Exception):
    """Why a row is refused; raised by readers, caught where the line is known."""


@dataclass
class Collector:
    """Gathers rows while a file is read."""

    scorer: str
    scorer_version: str
    aspect: str
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    feedback: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    pairs: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    identical: list[tuple[str, str, str | None]] = field(default_factory=list)
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def read(self, records: Iterable[tuple[int, Any]], take: Callable[[Collector, Any], None]) -> Imported:
        """The result of taking every record, given with its line; one whose taking raises a Refusal is refused."""
        for line, record in records:
            self.rows += 1
            try:
                take(self, record)
            except Refusal as reason:
                self.refuse(line, str(reason), record)
        return self.done()

    def sample(
        self,
        prompt: str,
        text: str,
        *,
        own_id: str | None = None,
        reference: str | None = None,
        new: bool = False,
    ) -> str:
        """Adds a sample and returns its id; ``new``: a repeated text is a new sample, not the same one."""
        occurrence = self._seen[prompt, text] if new else 0
        self._seen[prompt, text] += 1
        sample_id = own_id or content_hash("imported sample", prompt, text, occurrence)
        row = {
            "sample_id": sample_id,
            "prompt_id": prompt_id(prompt),
            "prompt": prompt,
            "text": text,
            "reference": reference,
        }
        known = self.samples.setdefault(sample_id, row)
        if (known["prompt"], known["text"]) != (prompt, text):
            raise Refusal("its sample_id belongs to another prompt or text")
        return sample_id

    def judged(self, sample_id: str, kind: str, status: str = "ok", **given: Any) -> None:
        """Adds a row of FEEDBACK; ``given``: value, label, text, reason, aspect, scorer, …."""
        row = self._shared_columns(status) | {"value": None, "label": None, "text": None} | given
        key = (sample_id, row["aspect"])
        if key in self.feedback:
            raise Refusal("its sample was already judged; the first judgement counts")
        self.feedback[key] = {**row, "sample_id": sample_id, "kind": kind}

    def compared(
        self, prompt: str, a: str, b: str, winner: str | None, status: str = "ok", **given: Any
    ) -> None:
        """Adds a row of PAIRS; ``given``: reason, favoured, aspect, scorer, …."""
        if a == b:
            raise Refusal("both responses are the same sample")
        row = self._shared_columns(status) | {"favoured": None} | given
        key = (min(a, b), max(a, b), row["aspect"])
        if key in self.pairs:
            raise Refusal("its pair was already judged; the first judgement counts")
        ids = {"prompt_id": prompt_id(prompt), "sample_a": a, "sample_b": b}
        self.pairs[key] = {**row, **ids, "winner": winner}

    def refuse(self, line: int, reason: str, row: Any) -> None:
        """Records a refused row."""
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
        self.refused.append(Refused(line, reason, excerpt(text)))

    def done(self) -> Imported:
        """The result, with only those samples that have a judgement or are in a pair."""
        notes = tuple(f"{note} ({count:,} ×)" for note, count in self.notes.items())
        used = {sample for sample, _ in self.feedback} | {i for a, b, _ in self.pairs for i in (a, b)}
        samples = [row for sample, row in self.samples.items() if sample in used]
        pairs = pl.DataFrame(list(self.pairs.values()), PAIRS)
        return Imported(
            pl.DataFrame(samples, SAMPLES),
            pl.DataFrame(list(self.feedback.values()), FEEDBACK),
            oriented(pairs),
            self.rows,
            tuple(self.refused),
            notes,
            pairs_as_read=pairs,
            identical=tuple(self.identical),
        )

    def _shared_columns(self, status: str) -> dict[str, Any]:
        return {
            "aspect": self.aspect,
            "status": status,
            "reason": None,
            "scorer": self.scorer,
            "scorer_version": self.scorer_version,
            "parser_version": None,
            "call_keys": [],
        }


def collector(path: Path, text: str | bytes, aspect: str) -> Collector:
    """A collector whose ``scorer`` is the file and whose version is a hash of its content."""
    raw = text if isinstance(text, str) else text.hex()
    return Collector(f"imported from {path.name}", content_hash("import", raw), aspect)


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        SettingsError: it cannot be read, or is not UTF-8.
    """
    try:
        # newline="": a carriage return inside a text is part of it.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None


def text_of(row: dict[str, Any], name: str, *, blank: bool = True) -> str:
    """A text field of a row.

    Raises:
        Refusal: missing, not text, or blank where that is not allowed.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise Refusal(f"no text in `{name}`")
    if mended(value) != value:
        raise Refusal(f"`{name}` contains a lone surrogate (half a character)")
    if not blank and not value.strip():
        raise Refusal(f"`{name}` is blank")
    return value


def finite(value: Any) -> float | None:
    """A number; None: it is not one (true and false are not), or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON has integers of any length
        return None
    return number if math.isfinite(number) else None


def list_of(row: dict[str, Any], name: str, length: int) -> Sequence[Any]:
    """A list field with one entry per generation.

    Raises:
        Refusal: not a list, or of another length.
    """
    value = row.get(name)
    if not isinstance(value, list):
        raise Refusal(f"no list in `{name}`")
    if len(value) != length:
        raise Refusal(f"`{name}` and `generations` differ in length")
    return value
