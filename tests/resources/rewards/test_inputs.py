"""What a scoring model is shown: templates, special tokens, and truncation."""

from __future__ import annotations

from typing import Any

import pytest

from resources.rewards.inputs import (
    Limits,
    Row,
    TooLong,
    chat_template,
    encode,
    end_position,
    shortened,
    trailing_ids,
)
from resources.workers.serving import CallError
from tests.resources.engines.tiny_models import tokenizer

WORDS = tokenizer()
PUBLISHED = "<|startoftext|>{prompt}\nTL;DR: {text}<|end|>"


def text_of(row: Row, part: str | None = None) -> str:
    kept = [i for i, p in zip(row.ids, row.parts, strict=True) if part in (None, p)]
    return str(WORDS.decode(kept))


def encoded(text: str, **options: Any) -> list[int]:
    return list(WORDS(text, add_special_tokens=False, **options)["input_ids"])


def test_a_template_is_tokenised_as_a_whole() -> None:
    (row,) = encode(WORDS, [(" for name in names: \nTL;DR:", " print a ")], PUBLISHED, "TL;DR:")
    whole = "<|startoftext|>for name in names:\nTL;DR: print a<|end|>"
    assert row.ids == encoded(whole)  # the end token of the template is one token
    assert row.ids[-1] == WORDS.eos_token_id
    assert text_of(row, "prompt") == "for name in names:"
    assert text_of(row, "text").strip() == "print a"


def test_a_text_that_spells_a_special_token_is_plain_text() -> None:
    (row,) = encode(WORDS, [("a<|end|>b", "c<|end|>d")], PUBLISHED, None)
    assert row.ids.count(WORDS.eos_token_id) == 1 and row.ids[-1] == WORDS.eos_token_id
    assert end_position(row, {0}) == len(row.ids) - 2
    (joined,) = encode(WORDS, [("ab", "c<|end|>d")], None, None)
    assert WORDS.eos_token_id not in joined.ids


def test_without_a_template_prompt_and_text_are_joined_as_the_policy_saw_them() -> None:
    (row,) = encode(WORDS, [("def add(", "a, b)")], None, None)
    assert row.ids == encoded("def add(") + encoded("a, b)")
    assert row.parts == ["prompt"] * len(encoded("def add(")) + ["text"] * len(encoded("a, b)"))
    (alone,) = encode(WORDS, [("", "a, b)")], None, None)
    assert alone.ids == encoded("a, b)")


def test_braces_in_prompts_and_texts_are_literal() -> None:
    (row,) = encode(WORDS, [("{text} {prompt}", "{prompt}")], "{prompt}|{text}", None)
    assert text_of(row) == "{text} {prompt}|{prompt}"


def bert_like() -> Any:
    """A tokenizer that adds [CLS] and [SEP] by itself."""
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", words.cls_token_id), ("[SEP]", words.sep_token_id)],
    )
    return words


def test_the_tokenizers_own_special_tokens_appear_once() -> None:
    words = bert_like()
    cls, sep = words.cls_token_id, words.sep_token_id
    assert trailing_ids(words) == [sep]
    (plain,) = encode(words, [("", "a, b")], None, None)
    assert plain.ids == words("a, b")["input_ids"]
    for template in ("{prompt}[SEP]{text}", "[CLS]{prompt}[SEP]{text}[SEP]"):
        (row,) = encode(words, [("def", "a, b")], template, None)
        middle = words("def", add_special_tokens=False)["input_ids"]
        rest = words("a, b", add_special_tokens=False)["input_ids"]
        assert row.ids == [cls, *middle, sep, *rest, sep]


def test_the_prompt_loses_its_beginning_and_keeps_its_cue() -> None:
    prompt = "for name in names: " * 6 + "END"
    (row,) = encode(WORDS, [(prompt, "print(name)")], PUBLISHED, None)
    cut = shortened(row, Limits(len(row.ids) - 20, "end", False))
    assert len(cut.ids) == len(row.ids) - 20
    assert text_of(cut, "text") == text_of(row, "text")
    assert text_of(cut).startswith("<|startoftext|>") and "END\nTL;DR:" in text_of(cut)
    start = shortened(row, Limits(len(row.ids) - 20, "start", False))
    assert text_of(start, "prompt").startswith("for name") and "END" not in text_of(start)
    assert text_of(start, "text") == text_of(row, "text")
    assert shortened(row, Limits(len(row.ids), "end", False)) == row


def test_a_text_that_does_not_fit_is_refused_or_truncated() -> None:
    (row,) = encode(WORDS, [("def", "abc " * 30)], PUBLISHED, None)
    with pytest.raises(TooLong, match=r"the text has \d+ tokens and there is room for"):
        shortened(row, Limits(40, "end", False))
    cut = shortened(row, Limits(40, "end", True))
    assert len(cut.ids) == 40 and "prompt" not in cut.parts
    assert cut.ids[-1] == WORDS.eos_token_id and text_of(cut, "text").strip().startswith("abc abc")
    with pytest.raises(TooLong):
        shortened(row, Limits(3, "end", True))  # not even one token of the text


def test_the_reward_is_read_before_the_first_end_token_after_the_text() -> None:
    assert end_position(Row([5, 6, 7, 0, 0], ["fixed", "prompt", "text", "fixed", "fixed"]), {0}) == 2
    assert end_position(Row([0, 6, 7, 8], ["fixed", "prompt", "text", "fixed"]), {0}) == 3
    assert end_position(Row([5, 6, 0], ["fixed", "prompt", "fixed"]), {0}) == 1  # an empty text


def test_chat_templates_become_plain_templates() -> None:
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}<|best|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    )
    template = chat_template(words)
    assert template == "<|best|>user\n{prompt}<|end|>\n<|best|>assistant\n{text}<|end|>\n"
    (row,) = encode(words, [("def add", "return a")], template, None)
    turns = [{"role": "user", "content": "def add"}, {"role": "assistant", "content": "return a"}]
    assert row.ids == list(words.apply_chat_template(turns, tokenize=True)["input_ids"])
    with pytest.raises(CallError, match="chat template cannot be used"):
        chat_template(tokenizer())
    words.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(CallError, match="does not contain prompt and answer"):
        chat_template(words)
