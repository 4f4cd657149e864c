"""Red-teaming: a language model writes prompts on which the policy does badly."""

from __future__ import annotations

from pydantic import Field, model_validator

from textalign_dagster.settings import Settings


class RedTeam(Settings):
    """Rounds in which effective prompts are shown to a language model, which writes more of them.

    Source: Korbak et al. 2023 (arXiv:2302.08582), section 4.3; after Perez et al. 2022 (arXiv:2202.03286).
    """

    path: str = Field(
        ...,
        description="A prompt file as in prompts.path: the initial prompts of the pool, relative to the experiment file.",
    )
    model: str = Field(
        "base",
        description="The language model that writes prompts: `base`, the base policy, or a folder or a hub id.",
    )
    rounds: int = Field(10, ge=1, description="Rounds; each adds its prompts to the pool.")
    candidates: int = Field(20, ge=1, description="Prompts written per round; known ones are left out.")
    shown: int = Field(
        4,
        ge=1,
        description="Prompts of the pool that the model is shown, drawn for each round.",
    )
    sharpness: float = Field(
        10.0,
        ge=0,
        description="A prompt is drawn with weight exp(sharpness·badness); badness is the mean of the first measure of "
        "its completions, from 0 (the best of the pool) to 1 (the worst). 0: uniform.",
    )
    separator: str = Field(
        "\n", min_length=1, description="Text between prompts, which also ends a written one."
    )
    max_prompt_tokens: int = Field(64, ge=1, description="Longest written prompt, in tokens.")
    samples: int = Field(32, ge=1, description="Completions per prompt.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature of the completions; 0 is greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus sampling of the completions.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest completion, in tokens; null: evaluation.max_new_tokens."
    )

    @model_validator(mode="after")
    def _enough_samples(self) -> RedTeam:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "samples: greedy completions of a prompt are all the same; set it to 1, or raise temperature"
            )
        return self
