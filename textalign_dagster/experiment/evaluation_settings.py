"""The section ``evaluation`` of an experiment: how a policy is measured, and what it is compared with."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.scorers import AnyScorer
from textalign_dagster.settings import Settings
from textalign_dagster.settings.judge import Judge
from textalign_dagster.settings.lm_eval import LMEval
from textalign_dagster.settings.red_team import RedTeam
from textalign_dagster.settings.scenarios import Scenario

JUDGED: dict[str, tuple[FeedbackKind, ...]] = {
    "text": ("text",),
    "category": ("category",),
    "judgment": ("judgment",),
    "rating": ("reward",),
    "ranking": ("reward",),
    "win": ("reward",),
}
"""The kinds of feedback that a judge's answers give a method, by `judge.ask`."""


def short_form(value: Any) -> Any:
    """``scorer: toxicity`` is short for ``scorer: {name: toxicity}``."""
    return {"name": value} if isinstance(value, str) else value


class BestOfN(Settings):
    """The best of n samples of the base policy, as ranked by a scorer: what training has to beat."""

    n: tuple[int, ...] = Field(
        (1, 4, 16),
        strict=False,
        min_length=1,
        description="How many samples the best is chosen from; all n share one set of samples.",
    )
    samples: int | None = Field(
        None, ge=1, description="Samples of each held-out prompt; null: as many as the largest n."
    )
    scorer: AnyScorer | None = Field(
        None,
        description="What ranks the samples; null: the experiment's scorer, or the task's own reward. A scorer "
        "other than the one that measures shows how far ranking by it can be trusted.",
    )
    judge: Judge | None = Field(
        None,
        description="An LLM that ranks them instead, by its ratings or by comparing all samples of a prompt.",
    )

    _short_form = field_validator("scorer", mode="before")(short_form)

    @model_validator(mode="after")
    def _enough(self) -> BestOfN:
        if self.judge is not None:
            if self.scorer is not None:
                raise ValueError("judge, scorer: only one of them can rank the samples; remove the other")
            if "reward" not in JUDGED.get(self.judge.ask, ()):
                raise ValueError(
                    f"judge.ask: {self.judge.ask} gives nothing to rank by; set it to `rating` or `ranking`"
                )
        if min(self.n) < 1 or len(set(self.n)) < len(self.n):
            raise ValueError(f"n: {list(self.n)}: each must be 1 or more, and listed once")
        if self.samples is not None and self.samples < max(self.n):
            raise ValueError(
                f"samples: {self.samples}, but the best of {max(self.n)} is requested; raise it to "
                f"{max(self.n)} or more"
            )
        return self

    @property
    def candidates(self) -> int:
        """Samples of each prompt."""
        return self.samples or max(self.n)


class Evaluation(Settings):
    """How a policy is measured, on prompts that no iteration trains on."""

    path: str | None = Field(
        None, description="A prompt file as in prompts.path, instead of the task's held-out prompts."
    )
    prompts: int = Field(192, ge=2, description="Held-out prompts, the same in every iteration.")
    samples_per_prompt: int = Field(2, ge=1, description="Completions of each prompt.")
    temperature: float = Field(0.8, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest completion, in tokens; null: sampling.max_new_tokens."
    )
    scorer: AnyScorer | None = Field(
        None,
        description="What scores the samples; null: the experiment's scorer, or the task's own. A policy "
        "trained on a scorer may learn to exploit it; another one here reveals that.",
    )
    judge: Judge | None = Field(
        None, description="An LLM that also judges the samples; null: none does, whatever gives the feedback."
    )
    fluency_model: str | None = Field(
        None,
        description="The language model whose perplexity measures drift (a folder or a hub id, e.g. "
        "openai-community/gpt2-xl); null: the base policy.",
    )
    kl_reference: str | None = Field(
        None,
        description="The language model of KL(reference || policy): `base`, the base policy, or a folder or a hub id; "
        "it is sampled on the held-out prompts at temperature 1. null: not measured.",
    )
    baselines: dict[str, str] = Field(
        {},
        description="Name → model (a folder or a hub id) evaluated alongside the policy, once, in the same "
        "way; `references` stands for the source's human answers.",
    )
    best_of_n: BestOfN | None = Field(
        None,
        description="Best-of-n of the base policy alongside iteration 0, once, as baselines `best of N`; null: none.",
    )
    scenarios: dict[str, Scenario] = Field(
        {},
        description="Name → another way to sample the policy (without a prompt, from another prompt file, with other "
        "decoding), measured in the same way.",
    )
    red_team: RedTeam | None = Field(
        None, description="Searches in rounds for prompts that make the policy do badly; null: no search."
    )
    lm_eval: LMEval | None = Field(
        None,
        description="Tasks of lm-evaluation-harness (pip install -e '.[harness]'); null: none.",
    )
    probe: bool = Field(
        True, description="Also evaluate under the method's other conditions: does the policy obey?"
    )
    text_statistics: bool = Field(
        False,
        description="Also report PHF's statistics over all texts: entropies of 1-grams and 2-grams, and word-level "
        "Self-BLEU-5 (pip install -e '.[metrics]').",
    )
    rouge: bool = Field(
        False, description="Also report ROUGE-1, -2 and -L against the held-out prompts' references."
    )
    resamples: int = Field(1000, ge=100, description="Bootstrap resamples of prompts for the intervals.")

    _short_form = field_validator("scorer", mode="before")(short_form)
