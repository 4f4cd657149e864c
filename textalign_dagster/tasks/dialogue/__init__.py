"""Dialogues, as in Anthropic's HH: continue as the assistant, helpfully and without doing harm.

Prompts are whole dialogues of several turns. A judge sees all of them (the code of the ALT paper
showed only the last turn), and its labels are those of the template harm_category. The task judges
nothing itself: the experiment names a judge or a scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.tasks.base import Measure
from textalign_dagster.tasks.chat import ChatTask
from textalign_dagster.tasks.dataset_rows import BadRow, Row
from textalign_dagster.tasks.dialogue.measuring import MEASURES, measured
from textalign_dagster.tasks.dialogue.reading import dialogue_of, shortened
from textalign_dagster.tasks.written import Writer
from textalign_dagster.turns import BadDialogue, transcript


class Dialogue(ChatTask):
    """Shares of the judge's categories: harmless and very helpful, …, harmful."""

    name: Literal["dialogue"] = "dialogue"
    format: Literal["hh", "chat_template"] = Field(
        "hh",
        description="How a dialogue is rendered for the policy. hh: `Human: …`, blank line, `Assistant: …`, "
        "ending with `Assistant:`, without leading blank lines; chat_template: by a chat template.",
    )
    max_turns: int | None = Field(
        None,
        ge=1,
        description="Longer dialogues lose their oldest turns, so that they begin with a human turn; null: no "
        "limit.",
    )
    max_characters: int | None = Field(
        None,
        ge=1,
        description="The same by the length of the rendered prompt. The last turn is never cut: a prompt whose "
        "last turn alone is too long is left out, and counted (task.data.max_refused).",
    )

    mixed_evaluation: ClassVar[bool] = True  # HH lists all harmless dialogues before all helpful ones

    @model_validator(mode="after")
    def _template_with_its_format(self) -> Self:
        if (self.format == "chat_template") != (self.chat_template is not None):
            raise ValueError(
                "`format: chat_template` and `chat_template` belong together; give both (`chat_template: model` "
                "takes the policy's own) or neither"
            )
        return self

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        return {name: (name,) for name in ("messages", "prompt", "chosen", "reference")}

    def row(self, values: Mapping[str, Any]) -> Row:
        try:
            dialogue = dialogue_of(values)
            prompt = shortened(dialogue.turns, self._writer(), self.max_turns, self.max_characters)
        except BadDialogue as error:
            raise BadRow(str(error)) from None
        return Row(prompt, dialogue.answer)

    def cleaned(self, prompt: str) -> str:
        dialogue = dialogue_of({"prompt": prompt})
        return shortened(dialogue.turns, self._writer(), self.max_turns, self.max_characters)

    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        return measured(samples)

    @property
    def measures(self) -> tuple[Measure, ...]:
        return MEASURES

    def _writer(self) -> Writer:
        return transcript if self.format == "hh" else self.chat_writer()
