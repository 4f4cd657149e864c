"""Rendering is data-safe, exact, and happens once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textalign_dagster.pool.conditioning import render, rendered_once, validate_template

TEMPLATE = "feedback: {condition} input: {prompt}"


def test_renders_condition_and_prompt() -> None:
    assert render(TEMPLATE, "Concise.", "A post.") == "feedback: Concise. input: A post."


def test_without_a_condition_the_prompt_is_unchanged() -> None:
    assert render(TEMPLATE, None, "A {post}.") == "A {post}."


def test_an_empty_condition_is_a_condition() -> None:
    assert render(TEMPLATE, "", "A post.") == "feedback:  input: A post."


def test_the_condition_can_follow_the_prompt() -> None:
    assert render("{prompt} ({condition}):", "short", "Why?") == "Why? (short):"


def test_placeholders_in_the_data_are_literal() -> None:
    assert render(TEMPLATE, "{prompt}", "{condition}") == "feedback: {prompt} input: {condition}"


def test_other_braces_of_the_template_are_literal() -> None:
    assert render("{{}} {condition} {0} {prompt}", "a", "b") == "{{}} a {0} b"


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{condition}",
        "{prompt}",
        "{prompt} {condition} {prompt}",
        "{condition}{condition}{prompt}",
    ],
)
def test_an_invalid_template_is_rejected_and_quoted(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once") as error:
        validate_template(template)
    assert repr(template) in str(error.value)
    with pytest.raises(ValueError, match="exactly once"):
        render(template, None, "prompt")


@given(
    before=st.text("ab {}\n", max_size=5),
    between=st.text("ab {}\n", max_size=5),
    condition=st.text("{}condition prompt"),
    prompt=st.text("{}condition prompt"),
)
def test_rendering_keeps_every_character(before: str, between: str, condition: str, prompt: str) -> None:
    template = before + "{condition}" + between + "{prompt}"
    if template.count("{condition}") != 1 or template.count("{prompt}") != 1:
        return
    assert render(template, condition, prompt) == before + condition + between + prompt


def test_rendered_once() -> None:
    once = render(TEMPLATE, "Good.", "Post")
    twice = render(TEMPLATE, "Good.", once)
    assert rendered_once(once, TEMPLATE, "Good.", "Post")
    assert rendered_once("Post", TEMPLATE, None, "Post")
    assert not rendered_once("Post", TEMPLATE, "Good.", "Post")
    assert not rendered_once(twice, TEMPLATE, "Good.", once)
    assert not rendered_once(twice, TEMPLATE, "Good.", "Post")
