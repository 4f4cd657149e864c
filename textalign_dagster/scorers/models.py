"""Scorers that are models: a classifier or a reward model. They run in a worker process (no torch here)."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.scorers.base import Scorer, trained_by
from textalign_dagster.scorers.file_stamps import model_identity
from textalign_dagster.settings import Settings
from textalign_dagster.settings.clusters import RayNode, SlurmNode
from textalign_dagster.settings.kubernetes import KubernetesPod

MODELS_VERSION = "1"
"""Raised with every change to what a model is shown or how its output is read."""

CHAT = "chat"
"""The value of ``template`` that selects the chat template of the model's own tokenizer."""

PUBLISHED_TEMPLATE = "<|startoftext|>{prompt}\nTL;DR: {text}<|endoftext|>"
PUBLISHED_CUE = "TL;DR:"

_PLACES = re.compile(r"\{(prompt|text)\}")


class ModelCheck(Settings):
    """Pairs that the model must tell apart before any of its scores are trusted."""

    path: str = Field(
        ..., description="JSON Lines of prompt, chosen, rejected (relative to the experiment file)."
    )
    min_accuracy: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Share of pairs whose chosen text must get the better score. A wrongly loaded "
        "model is at 0.5, like an untrained one.",
    )


class ModelScorer(Scorer):
    """What all model scorers share: which model, what it is shown, and how it runs."""

    model: str = Field(
        ...,
        min_length=1,
        description="A transformers folder (relative to the experiment file), a hub id, or EXPERIMENT@ITERATION (a "
        "reward model trained by an experiment).",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub model; only a commit never changes."
    )
    template: str | None = Field(
        None,
        description="The model's input, with {prompt} and {text}, both stripped of surrounding whitespace; "
        "`chat`: its tokenizer's chat template; null: prompt and text as the policy saw them.",
    )
    cue: str | None = Field(
        None,
        description="Removed from the end of a prompt before the template is filled, because the template adds it.",
    )
    max_length: int | None = Field(
        None, ge=2, description="Longest input in tokens; null: the model's maximum."
    )
    keep: Literal["end", "start"] = Field(
        "end",
        description="Which end of a prompt is kept if prompt and text are too long; the text always is.",
    )
    allow_truncated_text: bool = Field(
        False, description="Whether a text that is too long by itself is cut at the end instead of failing."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Number format.")
    device: str = Field("auto", description="auto (a GPU, if available), cpu, cuda, cuda:1, …")
    batch_tokens: int = Field(
        16384, ge=1, description="Tokens scored together, including padding; fewer need less memory."
    )
    trust_remote_code: bool = Field(False, description="Run Python code from the model folder.")
    launcher: Literal["local", "slurm", "ray", "k8s"] = Field(
        "local",
        description="Where the model runs: on this machine, as a job of a Slurm cluster, on Ray, or as a pod of "
        "Kubernetes (docs/clusters.md).",
    )
    slurm: SlurmNode = Field(SlurmNode(), description="The job, with `launcher: slurm`.")
    ray: RayNode = Field(RayNode(), description="The resources, with `launcher: ray`.")
    k8s: KubernetesPod = Field(KubernetesPod(), description="The pod, with `launcher: k8s`.")
    check: ModelCheck | None = Field(
        None, description="A test that the model must pass before it is trusted."
    )

    @field_validator("template")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is None or template == CHAT:
            return template
        places = _PLACES.findall(template)
        if places.count("text") != 1 or places.count("prompt") > 1:
            raise ValueError(
                f"{template!r} needs {{text}} once, and {{prompt}} at most once, as in '{{prompt}}\\n{{text}}'"
            )
        if places[-1] != "text":
            raise ValueError(f"{template!r} has the text before the prompt; put {{prompt}} first")
        return template

    @model_validator(mode="after")
    def _cue_with_template(self) -> ModelScorer:
        if self.cue is not None and self.shown_template is None:
            raise ValueError("cue: only a template adds it back; give a template, or remove the cue")
        return self

    @model_validator(mode="after")
    def _complete_pod(self) -> ModelScorer:
        if self.launcher == "k8s":
            self.k8s.check_complete()
        return self

    @property
    def trained(self) -> tuple[str, int] | None:
        return trained_by(self.model)

    @property
    def shown_template(self) -> str | None:
        """The template that is used."""
        return self.template

    @property
    def shown_cue(self) -> str | None:
        """The cue that is used."""
        return self.cue

    @property
    def version(self) -> str:
        return f"{MODELS_VERSION}+{content_hash(self.identity)[:8]}"

    @property
    def identity(self) -> dict[str, Any]:
        where = {"device", "batch_tokens", "launcher", "slurm", "ray", "k8s"}
        kept = self.model_dump(mode="json", exclude={*where, "check", "model", "revision"})
        return {**kept, **model_identity("model", self.model, self.revision), "reader": MODELS_VERSION}


class ClassifierScorer(ModelScorer):
    """The probability (or logit) of one label of a sequence classifier."""

    name: Literal["classifier"] = "classifier"
    label: str | int = Field(
        ..., union_mode="left_to_right", description="The label that is scored, by name or index (from 0)."
    )
    activation: Literal["sigmoid", "softmax", "none"] = Field(
        "softmax",
        description="softmax: labels are mutually exclusive; sigmoid: they are independent; none: the raw logit.",
    )
    reads: Literal["text", "prompt_and_text"] = Field("text", description="What the classifier is shown.")
    good: bool = Field(..., description="Whether the label is good (helpful: true) or bad (toxic: false).")

    @model_validator(mode="after")
    def _template_reads(self) -> ClassifierScorer:
        if self.reads == "text" and self.template is not None:
            if self.template == CHAT or "{prompt}" in self.template:
                raise ValueError("template: it shows the prompt; set `reads: prompt_and_text`")
        elif self.template not in (None, CHAT) and "{prompt}" not in (self.template or ""):
            raise ValueError("template: it has no {prompt}; add it, or set `reads: text`")
        return self

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher" if self.good else "lower"

    def value(self, score: float) -> float:
        if self.good:
            return score
        return -score if self.activation == "none" else 1.0 - score


class RewardModelScorer(ModelScorer):
    """The scalar of a reward model; higher is better."""

    name: Literal["reward_model"] = "reward_model"
    head: Literal["sequence_classification", "gptj_last_token"] = Field(
        "sequence_classification",
        description="sequence_classification: a transformers model with one output (or `label`); "
        "gptj_last_token: a language model with a bias-free linear head, read before the end token "
        "(CarperAI's format).",
    )
    label: str | int | None = Field(
        None,
        union_mode="left_to_right",
        description="The output that is the reward, by name or index, where there are several.",
    )
    weights: str | None = Field(
        None,
        description="gptj_last_token: the folder or hub id with the state dict of language model and head; "
        "`model` provides config and tokenizer. null: `model` has it, too.",
    )
    weights_revision: str | None = Field(None, description="Like `revision`, for `weights`.")

    @model_validator(mode="after")
    def _head(self) -> RewardModelScorer:
        if self.head == "gptj_last_token" and self.label is not None:
            raise ValueError("label: head gptj_last_token has one output; remove the label")
        if self.head == "sequence_classification" and (self.weights or self.weights_revision):
            raise ValueError("weights: only head gptj_last_token has separate ones; remove them")
        if self.template not in (None, CHAT) and "{prompt}" not in (self.template or ""):
            raise ValueError("template: it has no {prompt}; a reward model judges an answer to a prompt")
        return self

    @property
    def shown_template(self) -> str | None:
        if self.template is None and self.head == "gptj_last_token":
            return PUBLISHED_TEMPLATE
        return self.template

    @property
    def shown_cue(self) -> str | None:
        published = self.template is None and self.head == "gptj_last_token"
        return PUBLISHED_CUE if published and self.cue is None else self.cue

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher"

    @property
    def identity(self) -> dict[str, Any]:
        identity = super().identity
        if self.weights is None:
            return identity
        return {**identity, **model_identity("weights", self.weights, self.weights_revision)}
