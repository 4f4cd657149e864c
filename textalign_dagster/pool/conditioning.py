"""Conditioning: the one place where a requested feedback and a prompt become one text.

The condition is a column everywhere else. It is rendered here, at the last moment (sampling,
training), and never parsed back out of text: a prompt that happens to contain the template's words
is just a prompt.
"""

from __future__ import annotations

CONDITION = "{condition}"
PROMPT = "{prompt}"


def validate_template(template: str) -> str:
    """The template itself, if ``{condition}`` and ``{prompt}`` occur in it exactly once each.

    All other braces are literal text.

    Raises:
        ValueError: a placeholder is missing or repeated; names the template and the remedy.
    """
    for field in (CONDITION, PROMPT):
        times = template.count(field)
        if times != 1:
            raise ValueError(
                f"template {template!r}: {field} occurs {times} times; write it exactly once, "
                f'as in "{CONDITION} input: {PROMPT}"'
            )
    return template


def render(template: str, condition: str | None, prompt: str) -> str:
    """The text a policy reads.

    Args:
        template: text with ``{condition}`` and ``{prompt}``, each exactly once.
        condition: the feedback to condition on; None: the prompt is returned unchanged.
        prompt: the unconditioned prompt.

    Condition and prompt are data: braces in them stay as they are (no ``str.format``).

    Raises:
        ValueError: the template is not valid (also when ``condition`` is None).
    """
    start, end = around_prompt(template, condition)
    return start + prompt + end


def around_prompt(template: str, condition: str | None) -> tuple[str, str]:
    """The text that rendering puts before and after the prompt; ``("", "")`` without a condition.

    Raises:
        ValueError: the template is not valid.
    """
    validate_template(template)
    if condition is None:
        return "", ""
    start, end = template.split(PROMPT)
    return (
        (start.replace(CONDITION, condition), end)
        if CONDITION in start
        else (start, end.replace(CONDITION, condition))
    )


def rendered_once(rendered: str, template: str, condition: str | None, prompt: str) -> bool:
    """Whether ``rendered`` is the rendering of the arguments, and ``prompt`` is not already one.

    A prompt that already has the condition before it is rendered would get it twice: the mistake of
    conditioning a file by hand and then again in code.
    """
    if rendered != render(template, condition, prompt):
        return False
    start, end = around_prompt(template, condition)
    return not (start + end and prompt.startswith(start) and prompt.endswith(end))
