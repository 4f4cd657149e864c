"""The inputs of scoring models: prompt and text as token ids, truncated if too long. Imports no torch.

A template is filled and tokenised as a whole, as in the model's training. Prompt and text are plain
text even where they spell a special token; the template's own special tokens are special. The origin of
each token is tracked, so that the prompt is truncated, not the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from resources.workers.serving import CallError, reason
from textalign_dagster.tokenisation import encode_prompts, encode_texts, leading_ids, trailing_ids

Part = Literal["prompt", "text", "fixed"]
PROMPT: Final = "prompt"
TEXT: Final = "text"
_PRECEDENCE: tuple[Part, ...] = (TEXT, PROMPT)

# Placeholders that no template treats specially.
_STAND_IN = {PROMPT: "Aquestionstandshere", TEXT: "Ananswerstandshere"}


@dataclass(frozen=True)
class Row:
    """Token ids of one input, each with the part it came from."""

    ids: list[int]
    parts: list[Part]


@dataclass(frozen=True)
class Limits:
    """How long an input may be, and what is truncated."""

    max_length: int
    keep: Literal["end", "start"]
    allow_truncated_text: bool


class TooLong(Exception):
    """A text does not fit; the message says by how many tokens."""


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, rendered around {prompt} and {text}.

    Raises:
        CallError: it has none, or one that changes the text.
    """
    turns = [
        {"role": "user", "content": _STAND_IN[PROMPT]},
        {"role": "assistant", "content": _STAND_IN[TEXT]},
    ]
    try:
        written = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:
        raise CallError(
            f"the tokenizer's chat template cannot be used ({reason(error, 200)}); set `template` with {{prompt}} "
            "and {text}"
        ) from error
    if any(written.count(word) != 1 for word in _STAND_IN.values()):
        raise CallError(
            "the tokenizer's chat template does not contain prompt and answer once each; set `template` "
            "with {prompt} and {text}"
        )
    return str(written.replace(_STAND_IN[PROMPT], "{prompt}").replace(_STAND_IN[TEXT], "{text}"))


def encode(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], template: str | None, cue: str | None
) -> list[Row]:
    """Each (prompt, text) as the model reads it, untruncated, with the tokenizer's own leading and trailing tokens.

    Args:
        template: contains {text}, and usually {prompt}; None: both, tokenised separately and joined, as
            the policy saw them (a prompt of "" gives the text alone).
        cue: removed from a prompt's end before the template is filled.
    """
    if template is None:
        rows = _joined(tokenizer, pairs)
    else:
        rows = _filled(tokenizer, pairs, template, cue)
    return _framed(tokenizer, rows)


def shortened(row: Row, limits: Limits) -> Row:
    """The row in at most ``max_length`` tokens: the prompt loses tokens first, then, if allowed, the text's end.

    Raises:
        TooLong: the text alone does not fit.
    """
    surplus = len(row.ids) - limits.max_length
    if surplus <= 0:
        return row
    prompt = [i for i, part in enumerate(row.parts) if part == PROMPT]
    text = [i for i, part in enumerate(row.parts) if part == TEXT]
    dropped = prompt[:surplus] if limits.keep == "end" else prompt[::-1][:surplus]
    surplus -= len(dropped)
    if surplus > 0:
        if not limits.allow_truncated_text or surplus >= len(text):
            room = limits.max_length - (len(row.ids) - len(prompt) - len(text))
            raise TooLong(f"the text has {len(text)} tokens and there is room for {max(0, room)}")
        dropped += text[-surplus:]
    gone = set(dropped)
    kept = [i for i in range(len(row.ids)) if i not in gone]
    return Row([row.ids[i] for i in kept], [row.parts[i] for i in kept])


def end_position(row: Row, ends: set[int]) -> int:
    """The position whose output is the reward: before the first end or padding token after the text."""
    last = max((i for i, part in enumerate(row.parts) if part == TEXT), default=None)
    if last is None:  # an empty text
        last = max((i for i, part in enumerate(row.parts) if part == PROMPT), default=0)
    following = (i for i in range(last + 1, len(row.ids)) if row.ids[i] in ends)
    return next(following, len(row.ids)) - 1


def _joined(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    texts = encode_texts(tokenizer, [text for _, text in pairs])
    start = len(leading_ids(tokenizer))
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        sizes: tuple[tuple[Part, int], ...] = (
            ("fixed", start),
            (PROMPT, len(prompt) - start),
            (TEXT, len(text)),
        )
        rows.append(Row([*prompt, *text], [part for part, size in sizes for _ in range(size)]))
    return rows


def _filled(tokenizer: Any, pairs: Sequence[tuple[str, str]], template: str, cue: str | None) -> list[Row]:
    if not tokenizer.is_fast:
        raise CallError(
            "the tokenizer cannot report which token came from where (it is not a fast one), which a template "
            "requires; save it as tokenizer.json, or leave the template out"
        )
    pieces = _pieces(tokenizer, template)
    plain = [(_stripped(prompt, cue), text.strip()) for prompt, text in pairs]
    rows = [Row([], []) for _ in pairs]
    for piece in pieces:
        if isinstance(piece, int):
            for row in rows:
                row.ids.append(piece)
                row.parts.append("fixed")
            continue
        filled = [_fill(piece, prompt, text) for prompt, text in plain]
        encoded = tokenizer(
            [words for words, _ in filled],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        for row, ids, offsets, (_, places) in zip(
            rows, encoded["input_ids"], encoded["offset_mapping"], filled, strict=True
        ):
            row.ids.extend(ids)
            row.parts.extend(_part(start, end, places) for start, end in offsets)
    return rows


def _stripped(prompt: str, cue: str | None) -> str:
    prompt = prompt.strip()
    return prompt.removesuffix(cue.strip()).rstrip() if cue is not None else prompt


def _pieces(tokenizer: Any, template: str) -> list[int | str]:
    """The template as ids of special tokens, and the text between them."""
    special: dict[str, int] = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.content}
    if not special:
        return [template]
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    split = re.split(f"({pattern})", template)
    return [special.get(part, part) for part in split if part]


def _fill(piece: str, prompt: str, text: str) -> tuple[str, dict[Part, tuple[int, int]]]:
    """A piece with its placeholders filled, and the positions of prompt and text in it."""
    values: dict[Part, str] = {PROMPT: prompt, TEXT: text}
    places: dict[Part, tuple[int, int]] = {}
    written = ""
    for part in re.split(r"(\{prompt\}|\{text\})", piece):
        for name, value in values.items():
            if part == f"{{{name}}}":
                places[name] = (len(written), len(written) + len(value))
                part = value
                break
        written += part
    return written, places


def _part(start: int, end: int, places: dict[Part, tuple[int, int]]) -> Part:
    """Which part a token belongs to; one that overlaps both belongs to the text; else to the prompt, if any."""
    for name in _PRECEDENCE:
        first, last = places.get(name, (0, 0))
        if start < last and end > first:
            return name
    return "fixed"


def _framed(tokenizer: Any, rows: list[Row]) -> list[Row]:
    """The rows with the tokenizer's own leading and trailing tokens, which are not added twice."""
    start, end = leading_ids(tokenizer), trailing_ids(tokenizer)
    framed = []
    for row in rows:
        before: list[int] = [] if row.ids[: len(start)] == start else start
        after: list[int] = [] if not end or row.ids[-len(end) :] == end else end
        ids = [*before, *row.ids, *after]
        fixed: Part = "fixed"
        framed.append(Row(ids, [*[fixed] * len(before), *row.parts, *[fixed] * len(after)]))
    return framed
