"""The job file: everything about one training run, as JSON.

It is written where the training is launched and read by ``training.train``; a job can be rerun by
hand, and its text is part of the checkpoint's record.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from textalign_dagster.pool.conditioning import validate_template
from textalign_dagster.settings import Settings, SettingsError, validate
from training.settings import Training

PLACES = (
    "rows",
    "policy",
    "reference",
    "out",
    "beside",
    "adapter",
    "optimizer",
    "snapshots",
    "reference_log_probs",
    "policy_log_probs",
)
"""Fields of a job that are paths: they do not affect what is trained."""


REFERENCE_TABLE = "reference_log_probs.parquet"
"""File name of the table of the reference's log-probabilities, both read and written."""
POLICY_TABLE = "policy_log_probs.parquet"
"""The same for the policy that the training starts from, which `training.density_ratio` reads."""


class TrainingError(Exception):
    """Training cannot start or continue; the message is written for the user and needs no traceback."""


class JobError(TrainingError):
    """A job that cannot be run; the message names file, field and remedy."""


class NonFiniteError(TrainingError):
    """The loss or the weights are no longer finite; the message says where."""


class EndedError(TrainingError):
    """The training was stopped by a signal; its progress is in its snapshot."""


class Job(Settings):
    """One training run. Paths are absolute, or relative to the trainer's working directory."""

    rows: str = Field(
        ...,
        description="Parquet: sample_id, prompt, condition, text, finish_reason, n_tokens, weight, and the columns of the "
        "table `examples` that the objective needs.",
    )
    policy: str = Field(..., description="Transformers folder the training starts from.")
    reference: str | None = Field(None, description="Transformers folder of the objective's reference.")
    reference_log_probs: str | None = Field(
        None,
        description="Parquet: cached log-probabilities under the reference (those computed are written to `beside`); "
        "None: none.",
    )
    policy_log_probs: str | None = Field(
        None,
        description="The same under the policy that the training starts from, for training.density_ratio.",
    )
    out: str = Field(..., description="Folder to write: weights, config, tokenizer and, last, done.json.")
    beside: str | None = Field(
        None,
        description="Folder for what is not part of the policy: optimizer state, LoRA adapter; None: not kept.",
    )
    adapter: str | None = Field(
        None,
        description="Folder with the LoRA adapter to continue from (`adapter` in an earlier job's `beside`); `policy` "
        "is then its base model.",
    )
    optimizer: str | None = Field(
        None, description="Folder with the optimizer state to continue from (an earlier job's `beside`)."
    )
    snapshots: str | None = Field(
        None,
        description="Folder that outlives the training: it writes snapshots there, and resumes from the newest one.",
    )
    template: str | None = Field(
        None, description="With {condition} and {prompt}; None: no row has a condition."
    )
    special_tokens: list[str] = Field([], description="Tokens to add to the policy if it lacks them.")
    seed: int = Field(0, ge=0)
    world_size: int = Field(1, ge=1, description="Processes that the launcher starts.")
    sharing: Literal["DEEPSPEED", "FSDP"] | None = Field(
        None,
        description="What the launcher uses to shard the training; None: every process has everything.",
    )
    threads: int | None = Field(None, ge=1, description="torch threads per process; None: torch's default.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the weights, in training and as saved."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Of the sampling; required by eos_rule legacy."
    )
    training: Training

    @property
    def is_own_reference(self) -> bool:
        """Whether the policy that the training starts from is the objective's reference as well."""
        return self.reference is not None and Path(self.reference).resolve() == Path(self.policy).resolve()

    def write(self, path: Path) -> Path:
        """Writes the job as JSON and returns the path."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        return path


def read_job(path: Path) -> Job:
    """The job in a JSON file, checked as far as possible without loading a model.

    Raises:
        JobError: unreadable file, unknown or wrong fields, settings that contradict each other, or
            missing input files.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not JSON ({error}); write it with Job.write") from None
    if not isinstance(content, dict):
        raise JobError(f"{path}: a job must be a JSON object, found {type(content).__name__}")
    try:
        job: Job = validate(Job, content, str(path))
    except SettingsError as error:
        raise JobError(str(error)) from None
    check(job, str(path))
    return job


def check(job: Job, where: str) -> None:
    """Checks what cannot be checked field by field.

    Raises:
        JobError: naming the place, the field and the remedy.
    """
    objective = job.training.objective
    if objective.reference_policy is not None and job.reference is None:
        raise JobError(
            f"{where}: reference: missing; training.objective ({objective.name}) needs the "
            f"{objective.reference_policy} policy there"
        )
    if "reference log-probs" in objective.needs and job.beside is None:
        raise JobError(f"{where}: beside: missing; the reference's log-probabilities are written there")
    if job.training.density_ratio is not None and job.beside is None:
        raise JobError(f"{where}: beside: missing; the policy's log-probabilities are written there")
    if "value head" in objective.needs:
        for place, value in (
            ("training.packing", job.training.packing),
            ("training.lora", job.training.lora),
            ("sharing", job.sharing),
        ):
            if value:
                raise JobError(
                    f"{where}: {place}: cannot be combined with a value head; leave it out, or set "
                    "training.objective.value_head to false"
                )
    if "score head" in objective.needs and job.training.packing:
        raise JobError(f"{where}: training.packing: a score head needs padded rows; set it to false")
    if job.training.eos_rule == "legacy" and job.max_new_tokens is None:
        raise JobError(f"{where}: max_new_tokens: missing; eos_rule legacy needs it")
    if job.training.optimizer == "adamw_8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise JobError(
                f"{where}: training.optimizer: adamw_8bit needs the bitsandbytes package: pip install -e '.[8bit]'"
            )
        if job.sharing is not None:
            raise JobError(
                f"{where}: training.optimizer: adamw_8bit cannot be combined with {job.sharing}; set it to adamw"
            )
    if job.sharing is not None and job.training.optimizer_state == "carried":
        raise JobError(
            f"{where}: training.optimizer_state: {job.sharing} keeps optimizer state in its own format; set it "
            "to fresh"
        )
    if job.adapter is not None:
        if job.training.lora is None:
            raise JobError(
                f"{where}: adapter: training.lora is null; set its rank and alpha there, or leave adapter out"
            )
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(job.adapter) / name).is_file():
                raise JobError(
                    f"{where}: adapter: {job.adapter} has no {name}; train the previous iteration again, or "
                    "leave it out to start a new adapter"
                )
    if job.template is not None:
        try:
            validate_template(job.template)
        except ValueError as error:
            raise JobError(f"{where}: template: {error}") from None
    if not Path(job.rows).is_file():
        raise JobError(f"{where}: rows: no such file: {job.rows}")
    check_model_folder(Path(job.policy), f"{where}: policy")
    if job.reference is not None and objective.reference_policy is not None:
        check_model_folder(Path(job.reference), f"{where}: reference")


def check_model_folder(folder: Path, where: str) -> None:
    """Checks that a folder has a policy's files; weights in any format but safetensors are refused."""
    if not folder.is_dir():
        raise JobError(f"{where}: no such folder: {folder}")
    required: dict[str, Any] = {
        "config.json": [folder / "config.json"],
        "model*.safetensors (pickled weights are not loaded: save the model with transformers 5)": list(
            folder.glob("model*.safetensors")
        ),
        "tokenizer.json or tokenizer_config.json (save the tokenizer with the model)": [
            folder / "tokenizer.json",
            folder / "tokenizer_config.json",
        ],
    }
    for name, candidates in required.items():
        if not any(path.is_file() for path in candidates):
            raise JobError(f"{where}: {folder} has no {name}")
