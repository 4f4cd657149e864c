"""lm-evaluation-harness on every checkpoint, for the policy's other capabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from textalign_dagster.ids import folder_hash
from textalign_dagster.settings import Settings


class LMEval(Settings):
    """Tasks of EleutherAI's lm-evaluation-harness, run on the policy without any condition."""

    tasks: tuple[str, ...] = Field(
        ...,
        strict=False,
        min_length=1,
        description="Tasks or groups, as `lm-eval ls tasks` lists them, e.g. [hellaswag, arc_challenge].",
    )
    path: str | None = Field(
        None,
        description="A folder with your own task files, relative to the experiment file; null: none.",
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Few-shot examples before each question; null: the task's default."
    )
    limit: int | None = Field(None, ge=1, description="Maximum number of questions per task; null: all.")
    chat_template: bool = Field(
        False, description="Whether questions go through the tokenizer's chat template."
    )
    backend: Literal["hf", "vllm"] = Field("hf", description="What runs the model: transformers, or vLLM.")
    batch_size: int | Literal["auto"] = Field("auto", description="Texts per batch; only affects speed.")
    model_args: dict[str, Any] = Field(
        {},
        description="Further arguments of the backend, e.g. {parallelize: true} or {tensor_parallel_size: 2}.",
    )

    @property
    def files_hash(self) -> str | None:
        """Hash of the files in the folder `path`; None if it is not set."""
        if self.path is None:
            return None
        folder = Path(self.path)
        return folder_hash(folder, [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()])
