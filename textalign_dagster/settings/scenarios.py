"""Scenarios: further ways to sample a policy in an evaluation, in addition to the held-out prompts."""

from __future__ import annotations

from pydantic import Field

from textalign_dagster.settings import Settings


class Scenario(Settings):
    """One way to sample, and how its samples are counted (Korbak et al. 2023, arXiv:2302.08582, section 3)."""

    path: str | None = Field(
        None,
        description="A prompt file as in prompts.path; null: no prompt, the policy starts a text of its own after "
        "its end token.",
    )
    samples: int = Field(
        512, ge=1, description="Total number of samples, distributed over the prompts in turn."
    )
    prefix: str = Field("", description="Text before every prompt, after the condition.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; null: evaluation.temperature.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus; null: evaluation.top_p.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest completion, in tokens; null: evaluation.max_new_tokens."
    )
    min_new_tokens: int = Field(0, ge=0, description="Tokens before which a completion cannot end.")
    banned_tokens: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Tokens that are not sampled, in addition to the method's; each is one token of the policy's tokenizer.",
    )
    score_prompt: bool = Field(
        False, description="Whether prompt and completion are measured together, as one text."
    )
    hits: float | None = Field(
        None,
        description="The share of samples worse than this by the first measure of the score table is reported; null: none.",
    )
