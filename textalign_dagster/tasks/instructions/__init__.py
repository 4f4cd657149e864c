"""Following instructions, in the format of Alpaca: instruction, input and output.

The prompts of AlpacaEval are read from a local copy of its file (`evaluation.path`), and `textalign export
--format alpaca_eval` writes an evaluation for it. The task judges nothing itself: the experiment names a judge or
a scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, field_validator

from textalign_dagster.prompts import join_input
from textalign_dagster.tasks.base import Measure
from textalign_dagster.tasks.chat import ChatTask
from textalign_dagster.tasks.dataset_rows import BadRow, Row, optional_text_of, text_of
from textalign_dagster.turns import CUE, BadDialogue, Dialogue, Message, parse_transcript, split_answer

INSTRUCTION = "{instruction}"

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    f"\n\n### Instruction:\n{INSTRUCTION}\n\n### Response:\n"
)
"""The prompt template that Alpaca and CUT were trained with."""


class Instructions(ChatTask):
    """Instructions and responses to them; a judge or a scorer rates the responses."""

    name: Literal["instructions"] = "instructions"
    judged_by_others: ClassVar[bool] = True
    template: str = Field(
        ALPACA,
        description="The prompt of an instruction, with {instruction}; not used with `chat_template`.",
    )
    input_separator: str = Field(
        "\n", description='Text between an instruction and its input, if it has one (CUT: "\\n").'
    )

    @field_validator("template")
    @classmethod
    def _one_place(cls, template: str) -> str:
        if template.count(INSTRUCTION) != 1:
            raise ValueError(f"{template!r}: {INSTRUCTION} must appear exactly once")
        return template

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "instruction": ("instruction", "prompt"),
            "input": ("input",),
            "reference": ("output", "reference"),
        }

    def row(self, values: Mapping[str, Any]) -> Row:
        instruction, given = text_of(values, "instruction"), optional_text_of(values, "input")
        try:
            prompt = self.cleaned(join_input(instruction, given, self.input_separator))
        except ValueError as error:
            raise BadRow(str(error)) from None
        return Row(prompt, optional_text_of(values, "reference"))

    def cleaned(self, prompt: str) -> str:
        """An instruction, or a transcript, as it is shown to the policy.

        Raises:
            ValueError: blank, or a conversation of several turns without a chat template.
        """
        text = prompt.strip()
        if not text:
            raise ValueError("a blank instruction")
        turns: Dialogue = (Message("user", text),)
        if text.endswith(CUE):
            with suppress(BadDialogue):  # a text that only looks like a transcript is one turn
                turns, _ = split_answer(parse_transcript(text))
        if self.chat_template is not None:
            return self.chat_writer()(turns)
        if len(turns) > 1:
            raise ValueError("a conversation of several turns; `chat_template: model` can write it")
        return self.template.replace(INSTRUCTION, turns[0].content)

    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        return samples.select(
            "sample_id",
            words=pl.col("text").str.count_matches(r"\S+").cast(pl.Float64),
            cut_off=(pl.col("finish_reason") == "length").cast(pl.Float64),
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("words", "words", "words"),
            Measure("cut_off", "responses cut off", "cut_off", better="lower"),
        )
