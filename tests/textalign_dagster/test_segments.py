"""Segments are contiguous and match what a reader would call lines and sentences."""

from __future__ import annotations

import pytest

from textalign_dagster.segments import SegmentKind, cut, joined


def pieces(text: str, kind: SegmentKind) -> list[str]:
    return [text[start:end] for start, end in cut(text, kind)]


def test_lines_keep_their_line_endings() -> None:
    assert pieces("a = 1\n\n  b\r\nc", "line") == ["a = 1\n", "\n", "  b\r\n", "c"]


def test_sentences_keep_trailing_whitespace() -> None:
    text = 'He left.  "Why?" she asked! It is 3.5 km... Yes\n'
    assert pieces(text, "sentence") == ["He left.  ", '"Why?" ', "she asked! ", "It is 3.5 km... ", "Yes\n"]


@pytest.mark.parametrize("kind", ["line", "sentence", "document"])
@pytest.mark.parametrize("text", ["", " ", "\n\n", "No end", "One. Two.", "…!?\n .", "a\x0bb\x85c\u2028d"])
def test_segments_cover_the_whole_text(kind: SegmentKind, text: str) -> None:
    assert "".join(pieces(text, kind)) == text
    assert all(start < end for start, end in cut(text, kind))


def test_joining_existing_segments() -> None:
    assert joined(["ab", "", "c"]) == ("abc", [(0, 2), (2, 2), (2, 3)])
