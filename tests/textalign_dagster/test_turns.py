"""Dialogues worked out by hand: what is a turn, what is plain text, and what a policy is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textalign_dagster.settings import SettingsError
from textalign_dagster.tasks.chat_template import (
    template_file,
    template_of_model,
    templated,
)
from textalign_dagster.tasks.dialogue.measuring import measured
from textalign_dagster.tasks.dialogue.reading import dialogue_of, shortened
from textalign_dagster.tasks.written import ChatTemplate
from textalign_dagster.turns import (
    BadDialogue,
    Message,
    alternating,
    parse_transcript,
    runs_on,
    transcript,
)

HH = "\n\nHuman: Hi there.\n\nAssistant: Hello!\n\nHuman: What is 2 + 2?\n\nAssistant: Four."


def turns(*texts: str) -> tuple[Message, ...]:
    """Alternating turns; the user speaks first."""
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def test_hh_transcript() -> None:
    assert parse_transcript(HH) == turns("Hi there.", "Hello!", "What is 2 + 2?", "Four.")
    assert parse_transcript(HH.replace("\n", "\r\n")) == parse_transcript(HH)
    assert parse_transcript("Human: Hi\n\nAssistant:") == turns("Hi", "")


@pytest.mark.parametrize(
    "text",
    [
        "He said: Assistant: hello",
        "a list:\nHuman: not a turn, no blank line before it",
        "a line\n\n Human: not at the start of its line",
        "a line\n\nHumans: no such name",
        "a line\n\nhuman: in small letters",
        "a line\n\nHuman:Resources",
        "Human: at the very start",
    ],
)
def test_lookalike_turns_stay_text(text: str) -> None:
    dialogue = turns(text, "Yes.", "And?")
    assert parse_transcript(transcript(dialogue)) == (*dialogue, Message("assistant", ""))


def test_turns_keep_line_breaks_and_blank_lines() -> None:
    dialogue = turns("One.\n\nTwo.\nThree.", "a\n\nb", "c")
    assert parse_transcript(transcript(dialogue)) == (*dialogue, Message("assistant", ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with"),
        ("What is 2 + 2?", "does not begin with"),
        ("Well.\n\nHuman: Hi\n\nAssistant:", "does not begin with"),
        ("Human:\n\nAssistant: Hello", "a turn is blank"),
    ],
)
def test_invalid_transcripts(text: str, message: str) -> None:
    with pytest.raises(BadDialogue, match=message):
        parse_transcript(text)


PROMPT = "Human: Hi there.\n\nAssistant: Hello!\n\nHuman: What is 2 + 2?\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "Hi there."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": " What is 2 + 2?\n"},
]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"chosen": HH, "rejected": HH.replace("Four.", "Five.")}, "Four."),
        ({"prompt": PROMPT}, None),
        ({"prompt": "\n\n" + PROMPT, "reference": " Four. "}, "Four."),
        ({"prompt": PROMPT, "chosen": "Four.", "rejected": "Five."}, "Four."),
        ({"prompt": PROMPT, "chosen": PROMPT + " Four.", "rejected": "x"}, "Four."),
        ({"messages": MESSAGES}, None),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "Four."}], "prompt": "x"}, "Four."),
    ],
)
def test_every_source_format_gives_the_same_prompt(row: dict[str, Any], answer: str | None) -> None:
    dialogue = dialogue_of(row)
    assert transcript(dialogue.turns) == PROMPT
    assert dialogue.answer == answer


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no dialogue in"),
        ({"chosen": PROMPT + " Four.\n\nHuman: Thanks"}, "does not end with the assistant's turn"),
        ({"chosen": "Assistant: Hello"}, "no user turn"),
        ({"prompt": "Human: Hi"}, "does not end with `Assistant:`"),
        ({"prompt": PROMPT + " Four."}, "does not end with `Assistant:`"),
        ({"prompt": "Assistant:"}, "no user turn"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"role": "user"}]}, "no text in `content`"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": " "}]}, "a turn is blank"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "comes after another"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
    ],
)
def test_rows_without_a_dialogue_report_the_reason(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadDialogue, match=message):
        dialogue_of(row)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS.filter(lambda text: "\n\n" not in text), min_size=1, max_size=7))
def test_transcript_round_trip(texts: list[str]) -> None:
    dialogue = turns(*texts[: len(texts) - (len(texts) + 1) % 2])
    assert parse_transcript(transcript(dialogue)) == (*dialogue, Message("assistant", ""))


def test_oldest_turns_are_dropped_first_and_the_last_one_is_kept() -> None:
    dialogue = turns("first", "second", "third", "fourth", "fifth")
    whole = transcript(dialogue)
    assert shortened(dialogue, transcript, None, None) == whole
    assert shortened(dialogue, transcript, None, len(whole)) == whole
    later = "Human: third\n\nAssistant: fourth\n\nHuman: fifth\n\nAssistant:"
    assert shortened(dialogue, transcript, None, len(whole) - 1) == later
    assert shortened(dialogue, transcript, 4, None) == later  # the last four begin with an assistant turn
    assert shortened(dialogue, transcript, 3, None) == later
    last = "Human: fifth\n\nAssistant:"
    assert shortened(dialogue, transcript, 2, None) == shortened(dialogue, transcript, 1, None) == last
    assert shortened(dialogue, transcript, None, len(last)) == last
    with pytest.raises(BadDialogue, match="its last turn alone is longer than 10 characters"):
        shortened(dialogue, transcript, None, 10)


def test_system_message_is_kept_but_rejected_in_transcripts() -> None:
    dialogue = (Message("system", "Be brief."), *turns("a", "b", "c"))
    with pytest.raises(BadDialogue, match="a system message"):
        transcript(dialogue)
    assert shortened(dialogue, templated(CHATML), 1, None) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


CHATML = ChatTemplate(
    "{{ bos_token }}{% for message in messages %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml",
)


def test_chat_template_ends_with_the_generation_prompt() -> None:
    assert templated(CHATML)(turns("Hi", "Hello", "<b> & 'you'?")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n<b> & 'you'?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_renders_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- for m in messages -%}\n"
        "    {%- if m.role == 'assistant' %}{% generation %}[{{ m.content }}]{% endgeneration %}\n"
        "    {%- elif loop.index0 > 4 %}{% break %}{% else %} {{ m | tojson }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    dialogue = turns("ä <", "b", "c", "d", "e", "f", "g")
    messages = [{"role": turn.role, "content": turn.content} for turn in dialogue]
    expected, _ = transformers.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True
    )
    assert templated(ChatTemplate(source, "x"))(dialogue) == expected[0]


def test_consecutive_turns_of_one_role_are_merged_for_templates_only() -> None:
    dialogue = (Message("user", "a"), Message("user", "b"))
    assert alternating(dialogue) == [Message("user", "a\n\nb")]
    assert transcript(dialogue) == "Human: a\n\nHuman: b\n\nAssistant:"


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content }}", "{{ 1 / 0 }}"]
)
def test_template_that_rejects_a_dialogue(source: str) -> None:
    with pytest.raises(BadDialogue, match="the chat template rejects it"):
        templated(ChatTemplate(source, "x"))(turns("a"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_template_cannot_escape_its_sandbox(source: str) -> None:
    with pytest.raises(BadDialogue, match="unsafe"):
        templated(ChatTemplate(source, "x"))(turns("a"))


def test_invalid_templates(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"x is not a chat template \(line 2: "):
        templated(ChatTemplate("a\n{% for %}", "x"))
    with pytest.raises(SettingsError, match="uses `eos_token`, which is unknown for a file"):
        templated(ChatTemplate("{{ eos_token }}", "x"))
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        template_file(tmp_path / "none.jinja")


def test_chat_template_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no chat template; give a file"):
        template_of_model(tmp_path)
    config = {"chat_template": "a{{ eos_token }}", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert templated(template_of_model(tmp_path))(turns("x")) == "a</s>"
    several = [{"name": "rag", "template": "b"}, {"name": "default", "template": "c"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert templated(template_of_model(tmp_path))(turns("x")) == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert templated(template_of_model(tmp_path))(turns("x")) == "d"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Sure.\n\nHuman: Thanks!\n\nAssistant: Bye.", True),
        ("\n\nHuman: Hello?", True),
        (" Sure.\n\nAssistant: And more.", True),
        (" He said: Human: hello.", False),
        ("Human: I am.", False),
        (" Sure.\nHuman: no blank line", False),
        ("", False),
    ],
)
def test_an_answer_that_runs_on(text: str, expected: bool) -> None:
    assert runs_on(text) is expected


def test_measures_by_hand() -> None:
    samples = pl.DataFrame(
        {
            "sample_id": list("abcdef"),
            "text": [" Two words.", "", "x\n\nHuman: y", "one", "one", "one"],
            "finish_reason": ["stop", "stop", "length", "stop", "stop", "stop"],
            "score": [1.5, None, None, None, None, None],
            "label": [
                "Harmless and very helpful", "Harmful", "Harmless and helpful", None, "Harmless and not helpful",
                "of another judge",
            ],
        }
    )  # fmt: skip
    measures = measured(samples)
    assert measures.to_dict(as_series=False) == {
        "sample_id": list("abcdef"),
        "very_helpful": [1.0, 0.0, 0.0, None, 0.0, None],
        "helpful": [0.0, 0.0, 1.0, None, 0.0, None],
        "not_helpful": [0.0, 0.0, 0.0, None, 1.0, None],
        "harmful": [0.0, 1.0, 0.0, None, 0.0, None],
        "harmless": [1.0, 0.0, 1.0, None, 1.0, None],
        "score": [1.5, None, None, None, None, None],
        "words": [2.0, 0.0, 3.0, 1.0, 1.0, 1.0],
        "cut_off": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        "runs_on": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    }
    unjudged = measured(samples.with_columns(score=None, label=None))
    assert unjudged["harmless"].null_count() == unjudged["score"].null_count() == 6
    assert all(kind == pl.Float64 for name, kind in unjudged.schema.items() if name != "sample_id")
