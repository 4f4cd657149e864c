"""An experiment: one YAML file, typed. The CLI, the docs and the code location are derived from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from textalign_dagster.experiment.evaluation_settings import JUDGED, Evaluation, short_form
from textalign_dagster.methods import METHODS, AnyMethod, FeedbackKind
from textalign_dagster.prompts import Prompts
from textalign_dagster.scorers import AnyScorer, Scorer
from textalign_dagster.settings import Settings
from textalign_dagster.settings.judge import Judge
from textalign_dagster.settings.offline import Offline
from textalign_dagster.settings.pool import PoolSettings
from textalign_dagster.settings.sampling import HIGHEST_RANK, Sampling
from textalign_dagster.tasks import AnyTask
from training.settings import Training

OFFLINE: tuple[FeedbackKind, ...] = ("reward", "text", "category", "judgment")
"""The kinds of feedback that files can hold."""

IN_BLOCKS = ("nll", "unlikelihood", "awr")
"""Objectives that are defined per token."""

SEGMENTED: tuple[FeedbackKind, ...] = ("reward", "spans")
"""The kinds of feedback on the documents of a corpus."""

REFERENCES = "references"
"""As a baseline's model: the source's human answers, which are measured like samples."""

HEADS = {"lm_head", "embed_out", "embed_tokens", "wte", "embed_in"}
"""Names of embeddings and output heads."""


class Policy(Settings):
    """The model that iteration 1 samples from."""

    model: str = Field(
        ...,
        description="A policy shipped with the task, a local transformers folder (relative to the "
        "experiment file), or a hub id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Number format of the weights while sampling and training."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model folder.")


class Checks(Settings):
    """Limits. A blocking check that fails stops the iteration before the next stage."""

    max_unusable_feedback: float = Field(
        0.05, ge=0, le=1, description="Share of feedback that is unparseable or failed; blocking."
    )
    max_empty: float = Field(0.05, ge=0, le=1, description="Share of empty generations; blocking.")
    max_duplicates: float = Field(
        0.2, ge=0, le=1, description="Share of generations that repeat another one's text; blocking."
    )
    max_shortfall: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the requested rows that are missing from the worst-filled bucket; a warning.",
    )
    max_length_correlation: float = Field(
        0.5, ge=0, le=1, description="Absolute correlation of feedback value and length; a warning."
    )
    min_diversity: float = Field(
        0.7, ge=0, le=1, description="Distinct-3 of an evaluation relative to that of iteration 0; blocking."
    )


class Experiment(Settings):
    """task × method × policy × sampling × datapool × training × evaluation, and a seed."""

    description: str = Field("", description="One or two sentences, shown in the grid.")
    task: AnyTask = Field(..., description="What is learned, and who judges it.")
    method: AnyMethod = Field(..., description="How feedback becomes training.")
    judge: Judge | None = Field(
        None, description="An LLM that judges the samples, instead of the task's own scorer."
    )
    scorer: AnyScorer | None = Field(
        None,
        description="What scores the samples (patterns, a reward model, imported feedback, …), instead of "
        "the task's own scorer.",
    )
    policy: Policy = Field(..., description="The base policy.")
    iterations: int = Field(3, ge=1, le=999, description="Iterations after the base policy (0).")
    seed: int = Field(0, ge=0, description="All other seeds are derived from it.")
    control: str | None = Field(
        None,
        description="The experiment that is this one's null control (the same without feedback); "
        "run with it, and shown alongside it.",
    )
    offline: Offline | None = Field(
        None,
        description="Prompts, responses and judgements from a file, in place of the task's prompts and the policy's "
        "samples; with `judge` or `scorer`, these judge the responses. null: the policy is sampled.",
    )
    prompts: Prompts = Field(Prompts(), description="The prompts of an iteration.")
    sampling: Sampling = Field(Sampling(), description="The samples of an iteration.")
    datapool: PoolSettings = Field(PoolSettings(), description="The rows trained on.")
    training: Training = Field(Training(), description="How a checkpoint is trained.")
    evaluation: Evaluation = Field(Evaluation(), description="How a checkpoint is measured.")
    checks: Checks = Field(Checks(), description="When to stop or warn.")

    _short_form = field_validator("task", "method", "scorer", mode="before")(short_form)

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_method(cls, given: Any) -> Any:
        """Without a name, the objective is the method's first."""
        if not isinstance(given, dict):
            return given
        name, training = given.get("method"), given.get("training", {})
        method = METHODS.get(str(name.get("name") if isinstance(name, dict) else name))
        objective = training.get("objective", {}) if isinstance(training, dict) else None
        if method is None or not isinstance(objective, dict):
            return given
        return {**given, "training": {**training, "objective": {"name": method.objectives[0], **objective}}}

    @model_validator(mode="after")
    def _trainable(self) -> Experiment:
        objective, possible = self.training.objective.name, self.method.objectives
        if objective not in possible:
            raise ValueError(
                f"training.objective.name: method {self.method.name} trains with {' or '.join(possible)}, not "
                f"{objective}; set it to {possible[0]}, or choose another method"
            )
        return self

    @model_validator(mode="after")
    def _read_together(self) -> Experiment:
        together = self.method.read_together(self.sampling.samples_per_prompt)
        if self.training.batch_size < together:
            raise ValueError(
                f"training.batch_size: method {self.method.name} reads {together} rows together, but it is "
                f"{self.training.batch_size}; raise it to {together}"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Experiment:
        wants, kinds, who = self.method.wants, self.task.kinds, f"task {self.task.name}"
        if self.judge is not None and self.scorer is not None:
            raise ValueError("judge, scorer: only one of them can give the feedback; remove the other")
        if self.offline is not None:
            self._offline_possible(self.offline)
        if self.corpus is not None:
            kinds, who = SEGMENTED, "a corpus (`offline`)"
        elif self.judged_by_file:
            kinds, who = OFFLINE, "a file (`offline`)"
        elif self.sample_scorer is not None:
            kinds, who = self.sample_scorer.kinds, f"scorer {self.sample_scorer.name}"
        if self.judge is not None:
            kinds, who = JUDGED.get(self.judge.ask, ()), f"a judge asked for {self.judge.ask!r}"
        if wants is not None and wants not in kinds:
            raise ValueError(
                f"method {self.method.name} needs feedback of kind {wants!r}, which {who} does not give "
                f"(it gives: {', '.join(kinds) or 'nothing a method of the loop reads'}); choose another "
                "method, task or judge"
            )
        unknown = set(self.datapool.shares or {}) - set(self.method.buckets)
        if unknown:
            raise ValueError(
                f"datapool.shares: {', '.join(sorted(unknown))} is not a bucket of method "
                f"{self.method.name} (buckets: {', '.join(self.method.buckets)}); weigh these, or set "
                "`datapool.shares: null`"
            )
        return self

    @property
    def corpus(self) -> Offline | None:
        """The corpus file that is trained on; None: there is none."""
        return self.offline if self.offline is not None and self.offline.format == "corpus" else None

    @model_validator(mode="after")
    def _in_blocks(self) -> Experiment:
        block, objective = self.training.block, self.training.objective
        if self.corpus is None:
            if block is not None:
                raise ValueError(
                    "training.block: only a corpus is trained on in blocks (offline.format: corpus); remove it"
                )
            if self.method.per_segment:
                raise ValueError(
                    "method.tokens: segment: only a corpus has segments (offline.format: corpus); set it to sample"
                )
            return self
        if block is None:
            raise ValueError(
                "training.block: missing; a corpus is trained on in blocks; set their length in tokens, e.g. 1024"
            )
        if objective.name not in IN_BLOCKS:
            raise ValueError(
                f"training.objective: {objective.name} reads sequences one by one, but a corpus is trained on in blocks; "
                f"choose a method that trains with {', '.join(IN_BLOCKS)}"
            )
        if self.judge is not None:
            raise ValueError("judge: the segments of a corpus are scored by a scorer or the task; remove it")
        return self

    def _offline_possible(self, offline: Offline) -> None:
        if self.prompts.path is not None:
            raise ValueError("prompts.path: the prompts are those of offline.path; remove one of the two")
        if {"groups", "rewards"} <= self.training.objective.needs:
            raise ValueError(
                f"offline: objective {self.training.objective.name} is defined for the policy's own samples; remove "
                "offline, or choose another method"
            )
        if self.training.density_ratio is not None:
            raise ValueError(
                "training.density_ratio: a file has no log-probabilities of its responses; "
                "remove it, or weigh them by a query (datapool.weights)"
            )
        if self.method.trains == "reward model" and self.judged_by_file and offline.held_out is None:
            raise ValueError(
                "offline.held_out: missing; a reward model that is trained on a file is measured on responses to "
                "held-out prompts of it, e.g. `held_out: 200`"
            )

    @model_validator(mode="after")
    def _servable(self) -> Experiment:
        training, lora = self.training, self.training.lora
        if self.sampling.adapters == "merged":
            return self
        if lora is None:
            raise ValueError(
                "sampling.adapters: there are no adapters to serve; set training.lora, or remove it"
            )
        if not training.adapts_base:
            raise ValueError(
                "sampling.adapters: adapters are served on top of the base policy, but each of these belongs on top "
                "of the previous checkpoint (training.lora.adapter: new); set that to carried, or "
                "sampling.adapters to merged"
            )
        if self.method.special_tokens:
            raise ValueError(
                f"sampling.adapters: method {self.method.name} adds tokens, and vLLM does not load trained embeddings "
                "from an adapter; set it to merged"
            )
        if lora.rank > HIGHEST_RANK:
            raise ValueError(
                f"training.lora.rank: vLLM serves adapters up to rank {HIGHEST_RANK}, not {lora.rank}; lower it, or "
                "set sampling.adapters to merged"
            )
        heads = sorted(HEADS.intersection(name.rpartition(".")[2] for name in lora.target_modules))
        if lora.target_modules != "all-linear" and heads:
            raise ValueError(
                f"training.lora.target_modules: vLLM returns no prompt log-probabilities with an adapter on "
                f"{heads[0]}; leave it out, or set sampling.adapters to merged"
            )
        return self

    @property
    def sample_scorer(self) -> Scorer | None:
        """What scores the samples, unless a judge does; None: the task itself."""
        return self.scorer or self.task.default_scorer

    @property
    def evaluating_judges(self) -> dict[str, Judge]:
        """The LLM judges that an evaluation uses, by field."""
        ranking = self.evaluation.best_of_n.judge if self.evaluation.best_of_n is not None else None
        found = {"evaluation.judge": self.evaluation.judge, "evaluation.best_of_n.judge": ranking}
        return {field: judge for field, judge in found.items() if judge is not None}

    @property
    def judged_by_file(self) -> bool:
        """Whether the judgements come from the same file as the responses."""
        return self.offline is not None and self.judge is None and self.scorer is None

    @property
    def upstream(self) -> dict[str, Any]:
        """The settings that everything upstream of training depends on, which a null control must share."""
        sections = {"task", "policy", "seed", "offline", "prompts", "sampling", "evaluation"}
        found = self.model_dump(mode="json", include=sections)
        del found["evaluation"]["best_of_n"]  # it is measured in addition, and affects nothing else
        return found
