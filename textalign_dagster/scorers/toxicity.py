"""Rude words, insults and threats, found with our own lexicon, without model weights or network access.

It finds *words*, not meaning. A quotation, a negation ("you are no idiot") and a novel's dialogue
score like the real thing; contempt in polite words scores nothing. Slurs against groups are not in
the list, and only English is covered. It lets the loop run anywhere and makes tests exact; research
on toxicity needs a ``classifier`` or a judge. Its scores are comparable with each other, not with
published ones, which come from models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from itertools import groupby
from typing import Literal

from pydantic import Field, field_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.scorers.base import Span, TextScorer, merge_spans

TOXICITY_VERSION = "1"
"""Raised with every change to how words are found; the list of words is hashed separately."""

_LEET = str.maketrans("0134578@$!", "oieastbasi")
_OTHER_LEET = str.maketrans("0134578@$!", "oleastbasl")
_TOKEN = re.compile(r"[a-z0-9@$!*'’]+")
_SPACED = " .-_"
_LEAST_SPACED = 3  # letters of the shortest word that is found spelled out, as in "d u m b"

Runs = tuple[tuple[str, int], ...]
"""A word, run-length encoded: its letters, each with the number of consecutive repeats."""


@dataclass(frozen=True)
class Entry:
    """A listed word or phrase, split into tokens."""

    words: tuple[str, ...]
    weight: float
    kind: str


@dataclass(frozen=True)
class _Word:
    """A token of a text: the spellings it can stand for, and its position."""

    spellings: tuple[str, ...]
    start: int
    end: int


class ToxicityScorer(TextScorer):
    """0 (nothing found) to 1, lower is better; None for a text without a letter or digit.

    Every listed word or phrase in the text has a weight; the score is 1 - Π(1 - weight), so more of
    them never score less.
    """

    name: Literal["toxicity"] = "toxicity"
    words: dict[str, float] = Field(
        {},
        description="Words or phrases and their weights (0 to 1), in addition to the shipped list or overriding "
        "its weights; 0: ignored.",
    )

    @field_validator("words")
    @classmethod
    def _weights(cls, words: dict[str, float]) -> dict[str, float]:
        for word, weight in words.items():
            if not _plain(word):
                raise ValueError(f"{word!r} contains no letter or digit; it would never be found")
            if not 0 <= weight <= 1:
                raise ValueError(f"the weight of {word!r} is {weight}; give a number from 0 to 1")
        return words

    @property
    def version(self) -> str:
        listed = sorted((list(entry.words), entry.weight) for entry in self._entries)
        return f"{TOXICITY_VERSION}+{content_hash('toxicity', listed)[:8]}"

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "lower"

    def value(self, score: float) -> float:
        """The share that is not toxic, as published: 1 - score."""
        return 1.0 - score

    def spans(self, text: str) -> list[Span]:
        """The positions of listed words; the kind is insult, profanity, threat or (your own) listed."""
        found = [Span(start, end, entry.kind) for entry, start, end in self._found(text)]
        return merge_spans(found, touching=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float | None:
        if not any(character.isalnum() for character in text):
            return None
        clean = 1.0
        for entry, _, _ in self._found(text):
            clean *= 1.0 - entry.weight
        return 1.0 - clean

    def _found(self, text: str) -> Iterator[tuple[Entry, int, int]]:
        """Every listed word and phrase with its position; one inside another counts, too."""
        words = _tokens(text)
        for index, word in enumerate(words):
            for entry in self._at(words, index, word):
                yield entry, word.start, words[index + len(entry.words) - 1].end
        for letters, places in _spelled_out(text, words):
            position = 0
            while position < len(letters):
                spelled, size = self._longest(letters, position)
                if spelled is not None:
                    yield spelled, places[position][0], places[position + size - 1][1]
                position += size

    def _at(self, words: list[_Word], index: int, word: _Word) -> list[Entry]:
        """The entries that match the text from a token on."""
        matched: dict[tuple[str, ...], Entry] = {}
        for spelling in word.spellings:
            for runs, entries in self._beginning.get(_squeezed(spelling), ()):
                if not _stands_for(spelling, runs):
                    continue
                for entry in entries:
                    rest = words[index + 1 : index + len(entry.words)]
                    if len(rest) == len(entry.words) - 1 and all(
                        any(_stands_for(s, _runs(listed)) for s in token.spellings)
                        for listed, token in zip(entry.words[1:], rest, strict=True)
                    ):
                        matched[entry.words] = entry
        return list(matched.values())

    def _longest(self, letters: str, position: int) -> tuple[Entry | None, int]:
        """The longest single word spelled out from a position, and how far to advance."""
        longest = min(self._longest_word, len(letters) - position)
        for size in range(longest, _LEAST_SPACED - 1, -1):
            entry = self._single.get(letters[position : position + size])
            if entry is not None:
                return entry, size
        return None, 1

    @cached_property
    def _entries(self) -> tuple[Entry, ...]:
        own = {_plain(form): Entry(_plain(form), weight, "listed") for form, weight in self.words.items()}
        listed = {entry.words: entry for entry in _lexicon()} | own
        return tuple(entry for entry in listed.values() if entry.weight > 0)

    @cached_property
    def _beginning(self) -> dict[str, list[tuple[Runs, list[Entry]]]]:
        """Squeezed first word → (its runs, entries that begin with it)."""
        by_word: dict[str, list[Entry]] = {}
        for entry in self._entries:
            by_word.setdefault(entry.words[0], []).append(entry)
        found: dict[str, list[tuple[Runs, list[Entry]]]] = {}
        for word, entries in by_word.items():
            found.setdefault(_squeezed(word), []).append((_runs(word), entries))
        return found

    @cached_property
    def _single(self) -> dict[str, Entry]:
        return {entry.words[0]: entry for entry in self._entries if len(entry.words) == 1}

    @cached_property
    def _longest_word(self) -> int:
        return max((len(word) for word in self._single), default=0)


@lru_cache(maxsize=1)
def _lexicon() -> tuple[Entry, ...]:
    """The shipped list; if a form is listed twice, its greater weight counts."""
    text = files(__package__).joinpath("toxicity_words.tsv").read_text(encoding="utf-8")
    found: dict[tuple[str, ...], Entry] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        weight, kind, forms = line.split("\t")
        for form in forms.split(","):
            entry = Entry(_plain(form), float(weight), kind)
            if entry.words not in found or found[entry.words].weight < entry.weight:
                found[entry.words] = entry
    return tuple(found.values())


def _plain(form: str) -> tuple[str, ...]:
    """A listed form as tokens, spelled like the tokens of texts."""
    return tuple(word.spellings[0] for word in _tokens(form))


def _tokens(text: str) -> list[_Word]:
    """The words of a text; digits and signs are read as the letters they look like."""
    found = []
    for match in _TOKEN.finditer(_folded(text)):
        raw = match[0]
        kept = raw.strip("!'’")
        kept = kept.strip("*!'’") if kept.startswith("*") else kept  # *emphasis*, not a censored word
        if not kept:
            continue
        start = match.start() + raw.index(kept)
        found.append(_Word(_spellings(kept), start, start + len(kept)))
    return found


@lru_cache(maxsize=65536)
def _spellings(token: str) -> tuple[str, ...]:
    """The spellings a token can stand for: its own, and those with look-alikes read as letters."""
    plain = token.replace("'", "").replace("’", "")
    if plain.isalpha() or plain.isdigit():
        return (plain,)
    found = [plain, plain.rstrip("*")] if len(plain.rstrip("*")) >= 3 else [plain]  # "f***" is kept
    letters = sum(character.isalpha() for character in plain)
    if letters >= 2 or not any(character.isdigit() for character in plain):  # "4ss", not "a55"
        found += [one.translate(table) for one in found for table in (_LEET, _OTHER_LEET)]
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=4096)
def _folded_character(character: str) -> str:
    """A character without case and accents, always one character."""
    base = unicodedata.normalize("NFKD", character)[:1].lower()
    return base if len(base) == 1 else character


def _folded(text: str) -> str:
    """The text in plain lower-case letters, character by character, so that positions are kept."""
    return text.lower() if text.isascii() else "".join(map(_folded_character, text))


@lru_cache(maxsize=65536)
def _squeezed(word: str) -> str:
    """The word with every run of a letter collapsed to one."""
    return "".join(letter for letter, _ in groupby(word))


@lru_cache(maxsize=65536)
def _runs(word: str) -> Runs:
    return tuple((letter, len(list(run))) for letter, run in groupby(word))


def _stands_for(spelling: str, word: Runs) -> bool:
    """Whether a spelling stands for a word, allowing drawn-out letters (three or more).

    "stuuupid" is "stupid" and "asssss" is "ass", but "as" is not.
    """
    given = _runs(spelling)
    return len(given) == len(word) and all(
        letter == needed and (count == times or (count >= 3 and count > times))
        for (letter, count), (needed, times) in zip(given, word, strict=True)
    )


def _spelled_out(text: str, words: list[_Word]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Runs of single letters with one separator between them, as in "i d i o t" or "s-t-u-p-i-d"."""
    letters: list[str] = []
    places: list[tuple[int, int]] = []
    for word in words:
        single = word.end - word.start == 1
        follows = bool(places) and word.start - places[-1][1] == 1 and text[word.start - 1] in _SPACED
        if places and not (single and follows):
            if len(places) >= _LEAST_SPACED:
                yield "".join(letters), places
            letters, places = [], []
        if single:
            letters.append(word.spellings[-1])
            places.append((word.start, word.end))
    if len(places) >= _LEAST_SPACED:
        yield "".join(letters), places
