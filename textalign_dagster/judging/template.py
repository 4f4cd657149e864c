"""Judge templates: one YAML file per template, checked before the first call.

Everything that is the same for all items (rubric, few-shot examples) is rendered first and the item
last, so that providers and local engines can reuse the prefix (see `rendering`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator, model_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.judging.labels import normalise
from textalign_dagster.settings import Settings, nearest
from textalign_dagster.settings.judge import PAIRWISE, SCALED, Ask

STATIC = ("scale_low", "scale_high", "labels")
_ITEM = {
    "single": ("prompt", "response", "reference"),
    "pair": ("prompt", "response_a", "response_b", "reference"),
}
# {{name}} is the literal text {name}; any other brace (JSON, code) is literal.
_PLACEHOLDER = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")


class Criterion(Settings):
    """One criterion that responses are judged by."""

    name: str = Field(..., min_length=1, description="Its name, shown to the judge.")
    text: str = Field(..., min_length=1, description="What it means.")


class Scale(Settings):
    """The numbers a judge can give."""

    low: float = Field(..., strict=False, description="The worst value.")
    high: float = Field(..., strict=False, description="The best value.")
    integer: bool = Field(True, description="Whole numbers only.")

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("low and high must be whole numbers, or set `integer: false`")
        return self


class Example(Settings):
    """A few-shot example: an item's texts and the answer a good judge gives."""

    prompt: str
    response: str | None = None
    response_a: str | None = None
    response_b: str | None = None
    reference: str | None = None
    answer: dict[str, Any] = Field(..., description="The answer's fields, e.g. {rating: 2}.")


class Template(Settings):
    """A judge's instructions and the format of its answer."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="Stored with every row.")
    version: int = Field(..., ge=1, description="Incremented with every change; stored with every row.")
    ask: Ask = Field(..., description="The kind of answer.")
    aspect: str | None = Field(None, description="The column `aspect` of its rows; default: the name.")
    system: str = Field(..., min_length=1, description="Who the judge is and how it judges.")
    user: str = Field(..., min_length=1, description="How an item is shown: {prompt}, {response}, ….")
    criteria: tuple[Criterion, ...] = Field((), strict=False, description="What counts.")
    labels: tuple[str, ...] = Field((), strict=False, description="ask category: the closed set, best first.")
    scale: Scale | None = Field(None, description="ask text and rating: the numbers allowed.")
    max_words: int | None = Field(None, ge=1, description="ask text: the longest feedback allowed, in words.")
    explain: bool = Field(False, description="Whether the judge writes an analysis before the verdict.")
    examples: tuple[Example, ...] = Field((), strict=False, description="Few-shot examples.")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        plain = [normalise(label) for label in labels]
        if not all(plain):
            raise ValueError("a label has no letter or digit; use a word")
        if len(set(plain)) < len(plain):
            raise ValueError(
                "two labels differ only in case or punctuation, which replies do not distinguish"
            )
        return labels

    @model_validator(mode="after")
    def _complete(self) -> Template:
        if (self.ask == "category") != (len(self.labels) > 0) or len(self.labels) == 1:
            raise ValueError("labels: `ask: category` needs two or more, every other ask has none")
        if (self.ask in SCALED) != (self.scale is not None):
            raise ValueError("scale: `ask: text` and `ask: rating` need one, every other ask has none")
        if self.max_words is not None and self.ask != "text":
            raise ValueError("max_words: only `ask: text` has feedback in words; remove it")
        known = (*STATIC, *self._item_fields)
        for field, text in self._texts():
            for name in placeholders(text):
                if name not in known:
                    raise ValueError(
                        f"{field}: unknown placeholder {{{name}}}{nearest(name, known)}; known for "
                        f"`ask: {self.ask}`: {', '.join(known)} (literal text: {{{{{name}}}}})"
                    )
                if name not in STATIC and field != "user":
                    raise ValueError(
                        f"{field}: {{{name}}} changes from item to item; it belongs to `user`, which is "
                        "rendered last"
                    )
                if (name == "labels" and not self.labels) or (name.startswith("scale") and not self.scale):
                    raise ValueError(f"{field}: {{{name}}} is used, but the template has no such field")
        for name in self._item_fields[:-1]:
            times = placeholders(self.user).count(name)
            if times != 1:
                raise ValueError(f"user: {{{name}}} occurs {times} times; write it exactly once")
        for number, example in enumerate(self.examples, start=1):
            given = {name for name in Example.model_fields if getattr(example, name) is not None} - {"answer"}
            if given != set(self.item_fields):
                raise ValueError(
                    f"examples: example {number} gives {', '.join(sorted(given))}; "
                    f"`user` shows {', '.join(self.item_fields)}"
                )
        return self

    def _texts(self) -> list[tuple[str, str]]:
        criteria = [(f"criteria.{i}.text", c.text) for i, c in enumerate(self.criteria)]
        return [("system", self.system), ("user", self.user), *criteria]

    @property
    def _item_fields(self) -> tuple[str, ...]:
        return _ITEM["pair" if self.ask in PAIRWISE else "single"]

    @property
    def item_fields(self) -> tuple[str, ...]:
        """The texts an item must have, e.g. ("prompt", "response")."""
        used = placeholders(self.user)
        return tuple(name for name in self._item_fields if name in used)

    @property
    def kind(self) -> str:
        """The column ``kind`` of feedback rows."""
        return "ranking" if self.ask == "win" else self.ask

    @property
    def content_hash(self) -> str:
        """Hash of everything in the template: two that differ in one word have different hashes."""
        return content_hash("judge template", self.model_dump(mode="json"))

    @property
    def label_version(self) -> str:
        """The version with the start of the content hash, as stored with every row."""
        return f"{self.version}+{self.content_hash[:8]}"

    def with_scale(self, low: float, high: float) -> Template:
        """The template on another scale; the examples' numbers are rescaled linearly.

        Raises:
            ValueError: the template has no scale, or ``low`` is not below ``high``.
        """
        if self.scale is None:
            raise ValueError(f"template {self.name}: `ask: {self.ask}` has no scale")
        old, new = self.scale, Scale(low=low, high=high, integer=self.scale.integer)

        def rescaled(name: str, value: Any) -> Any:
            if name not in ("score", "rating"):
                return value
            moved = new.low + (value - old.low) / (old.high - old.low) * (new.high - new.low)
            return round(moved) if new.integer else moved

        examples = tuple(
            e.model_copy(update={"answer": {k: rescaled(k, v) for k, v in e.answer.items()}})
            for e in self.examples
        )
        return self.model_copy(update={"scale": new, "examples": examples})


def placeholders(text: str) -> list[str]:
    """The names of a text's placeholders, in order, with repeats."""
    return [match[2] for match in _PLACEHOLDER.finditer(text) if match[2]]


def fill(text: str, value: Callable[[str], str]) -> str:
    """The text with its placeholders replaced, in one pass: inserted text is never scanned again."""
    return _PLACEHOLDER.sub(lambda m: f"{{{m[1]}}}" if m[1] else value(m[2]), text)
