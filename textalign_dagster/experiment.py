"""An experiment: one YAML file, typed. The CLI, the docs and the code location follow from it."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from textalign_dagster.cluster_settings import RayNode, SlurmNode
from textalign_dagster.datapool import PoolSettings
from textalign_dagster.judge_settings import Judge
from textalign_dagster.kubernetes_settings import KubernetesPod
from textalign_dagster.methods import AnyMethod, FeedbackKind
from textalign_dagster.prompts import Prompts
from textalign_dagster.scorers import AnyScorer, Scorer
from textalign_dagster.settings import Settings
from textalign_dagster.structured import Structured
from textalign_dagster.tasks import AnyTask
from textalign_dagster.training_settings import Training

JUDGED: dict[str, tuple[FeedbackKind, ...]] = {
    "text": ("text",),
    "category": ("category",),
    "rating": ("reward",),
    "ranking": ("reward",),
    "win": ("reward",),
}
"""What a judge's answers are to a method."""

HIGHEST_RANK = 512
"""Of adapters that vLLM serves."""
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
    trust_remote_code: bool = Field(False, description="Run Python code that the model folder brings along.")


class Vllm(Settings):
    """How vLLM runs a policy: nothing here changes what is sampled."""

    tensor_parallel: int = Field(1, ge=1, description="GPUs over which a model is split.")
    data_parallel: int = Field(
        1, ge=1, description="Engines at work at the same time, each with tensor_parallel GPUs of its own."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory for weights, keys and values."
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="GiB for keys and values; null: what is left on a GPU, 1 on a CPU."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Tokens of a prompt with its completion, at most; null: what the model's positions hold "
        "(with long contexts that takes much memory).",
    )
    enforce_eager: bool | None = Field(
        None, description="Whether nothing is compiled beforehand; null: only on a CPU."
    )


class Endpoints(Settings):
    """vLLM servers that somebody has started: nothing here changes what is sampled."""

    urls: list[str] = Field(
        ...,
        min_length=1,
        description="Where the servers are, e.g. http://gpu1:8000; the least busy one gets the next request.",
    )
    api_key_env: str | None = Field(
        None, description="The environment variable with the servers' key (their --api-key); null: none."
    )
    timeout_s: float = Field(600.0, gt=0, description="Seconds for one request; then its server is left out.")
    verify: bool = Field(
        True,
        description="Compare the servers' log-probabilities of a short text with those of transformers on "
        "this machine's CPU, once a policy; it needs memory for the model.",
    )

    @field_validator("urls")
    @classmethod
    def _plain(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no URL of a server; give e.g. http://gpu1:8000")
            if parts.username or parts.password:
                raise ValueError(
                    f"the URL of {parts.hostname} carries credentials; put the key into an environment variable "
                    "and name it in api_key_env"
                )
        if len(set(urls)) < len(urls):
            raise ValueError("a server stands there twice; remove one")
        return urls


class Sampling(Settings):
    """How samples are drawn from the policy."""

    engine: Literal["transformers", "vllm", "endpoints"] = Field(
        "transformers",
        description="What generates: `transformers` (CPU or GPU), `vllm` (far faster with larger models), or "
        "`endpoints` (vLLM servers that you have started); see docs/sampling.md.",
    )
    vllm: Vllm | None = Field(None, description="`engine: vllm`: how it is run; null: as by default.")
    endpoints: Endpoints | None = Field(None, description="`engine: endpoints`: where the servers are.")
    launcher: Literal["local", "slurm", "ray", "k8s"] = Field(
        "local",
        description="Where the engine runs: on this machine, as a job of a Slurm cluster, on Ray, or as a pod of "
        "Kubernetes (docs/clusters.md).",
    )
    slurm: SlurmNode = Field(
        SlurmNode(), description="The job, where the launcher is slurm: one node for each engine."
    )
    ray: RayNode = Field(RayNode(), description="The place, where the launcher is ray: one for each engine.")
    k8s: KubernetesPod = Field(
        KubernetesPod(), description="The pod, where the launcher is k8s: one for each engine."
    )
    samples_per_prompt: int = Field(8, ge=1, description="Completions of each drawn prompt.")
    temperature: float = Field(
        1.0,
        ge=0,
        description="Below 1 the samples are sharper than the policy, and training on them sharpens it.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; 1 keeps the whole vocabulary.")
    top_k: int = Field(0, ge=0, description="Most likely tokens kept; 0 keeps all.")
    max_new_tokens: int = Field(64, ge=1, description="Longest completion, in tokens.")
    min_new_tokens: int = Field(0, ge=0, description="Tokens before the end may be sampled.")
    ignore_eos: bool = Field(
        False, description="Always sample max_new_tokens: then short answers cannot win."
    )
    structured: Structured | None = Field(
        None,
        description="What every completion has to be (one of choice, regex, json_schema, grammar), with "
        "`engine: vllm` or `endpoints`; null: free text.",
    )
    adapters: Literal["merged", "served"] = Field(
        "merged",
        description="How checkpoints of training.lora are sampled from: merged, or as the base policy with the adapter "
        "beside it (served; `engine: vllm` or `endpoints`), so that the engine never reads other weights.",
    )
    batch_size: int = Field(256, ge=1, description="Sequences decoded together.")
    chunk: int = Field(
        16_384,
        ge=1,
        description="Completions written at a time: what a crash while sampling costs, at most.",
    )

    @model_validator(mode="after")
    def _lengths(self) -> Sampling:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is larger than max_new_tokens; lower it")
        return self

    @model_validator(mode="after")
    def _structure(self) -> Sampling:
        if self.structured is not None and self.engine == "transformers":
            raise ValueError(
                "structured: `engine: transformers` samples free text only; set `engine: vllm` or `endpoints`, "
                "or remove it"
            )
        if self.structured is not None and (self.min_new_tokens or self.ignore_eos):
            raise ValueError(
                "structured: a completion ends where its structure does; remove min_new_tokens and ignore_eos"
            )
        return self

    @model_validator(mode="after")
    def _engine(self) -> Sampling:
        if self.vllm is not None and self.engine != "vllm":
            raise ValueError(f"vllm: only for `engine: vllm`, not {self.engine}; remove it")
        if self.endpoints is not None and self.engine != "endpoints":
            raise ValueError(f"endpoints: only for `engine: endpoints`, not {self.engine}; remove it")
        if self.engine == "endpoints" and self.endpoints is None:
            raise ValueError("endpoints: `engine: endpoints` needs `endpoints: {urls: [http://…]}`")
        if self.engine == "endpoints" and self.launcher != "local":
            raise ValueError("launcher: servers run where they were started; remove it")
        if self.launcher == "k8s":
            self.k8s.check_complete()
        if self.adapters == "served" and self.engine == "transformers":
            raise ValueError(
                "adapters: `engine: transformers` samples from merged ones; set adapters to merged, or `engine: vllm` "
                "or `endpoints`"
            )
        return self

    @property
    def served(self) -> dict[str, str]:
        """What samples of served adapters are known by, beside all else: their last digits may be others."""
        return {} if self.adapters == "merged" else {"adapters": self.adapters}


class Evaluation(Settings):
    """How a policy is measured, on prompts no iteration trains on."""

    path: str | None = Field(
        None, description="A prompt file as in prompts.path, instead of the task's held-out prompts."
    )
    prompts: int = Field(192, ge=2, description="Held-out prompts, the same in every iteration.")
    samples_per_prompt: int = Field(2, ge=1, description="Completions of each.")
    temperature: float = Field(0.8, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest completion, in tokens; null: sampling.max_new_tokens."
    )
    scorer: AnyScorer | None = Field(
        None,
        description="What scores the samples; null: the experiment's scorer, or the task's own. A model "
        "that is trained on its scorer may learn to please it: another one here shows that.",
    )
    judge: Judge | None = Field(
        None, description="An LLM that judges the samples too; null: none does, whatever judges the feedback."
    )
    fluency_model: str | None = Field(
        None,
        description="The language model whose perplexity measures drift (a folder or a hub id, e.g. "
        "openai-community/gpt2-xl); null: the base policy.",
    )
    baselines: dict[str, str] = Field(
        {},
        description="Name → model (a folder or a hub id) evaluated beside the policy, once, in the same "
        "way; `references` stands for the source's human answers.",
    )
    probe: bool = Field(
        True, description="Also evaluate under the method's other conditions: does the policy obey?"
    )
    resamples: int = Field(1000, ge=100, description="Bootstrap resamples over prompts behind the intervals.")

    @field_validator("scorer", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``scorer: toxicity`` is short for ``scorer: {name: toxicity}``."""
        return {"name": value} if isinstance(value, str) else value


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
        description="Share of the wanted rows of the worst-filled bucket that is missing; a warning.",
    )
    max_length_correlation: float = Field(
        0.5, ge=0, le=1, description="Absolute correlation of feedback value and length; a warning."
    )
    min_diversity: float = Field(
        0.7, ge=0, le=1, description="Distinct-3 of an evaluation over that of iteration 0; blocking."
    )


class Experiment(Settings):
    """task × method × policy × sampling × datapool × training × evaluation, and a seed."""

    description: str = Field("", description="One or two sentences for whoever reads the grid.")
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
    iterations: int = Field(3, ge=1, le=999, description="Iterations after the untouched policy (0).")
    seed: int = Field(0, ge=0, description="All other seeds are derived from it.")
    control: str | None = Field(
        None,
        description="The experiment that is this one's null control (the same without feedback); "
        "run with it, and shown beside it.",
    )
    prompts: Prompts = Field(Prompts(), description="The prompts of an iteration.")
    sampling: Sampling = Field(Sampling(), description="The samples of an iteration.")
    datapool: PoolSettings = Field(PoolSettings(), description="The rows trained on.")
    training: Training = Field(Training(), description="The training of a checkpoint.")
    evaluation: Evaluation = Field(Evaluation(), description="The measuring of a checkpoint.")
    checks: Checks = Field(Checks(), description="When to stop or warn.")

    @field_validator("task", "method", "scorer", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``method: quark`` is short for ``method: {name: quark}``."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Experiment:
        wants, kinds, who = self.method.wants, self.task.kinds, f"task {self.task.name}"
        if self.judge is not None and self.scorer is not None:
            raise ValueError("judge, scorer: one of them says what the samples are worth; remove the other")
        if self.sample_scorer is not None:
            kinds, who = self.sample_scorer.kinds, f"scorer {self.sample_scorer.name}"
        if self.judge is not None:
            kinds, who = JUDGED.get(self.judge.ask, ()), f"a judge asked for {self.judge.ask!r}"
        if wants is not None and wants not in kinds:
            raise ValueError(
                f"method {self.method.name} wants feedback of kind {wants!r}, which {who} does not give "
                f"(it gives: {', '.join(kinds) or 'nothing a method of the loop reads'}); choose another "
                "method, task or judge"
            )
        unknown = set(self.datapool.shares or {}) - set(self.method.buckets)
        if unknown:
            raise ValueError(
                f"datapool.shares: {', '.join(sorted(unknown))} is no bucket of method "
                f"{self.method.name} (buckets: {', '.join(self.method.buckets)}); weigh these, or set "
                "`datapool.shares: null`"
            )
        return self

    @model_validator(mode="after")
    def _servable(self) -> Experiment:
        training, lora = self.training, self.training.lora
        if self.sampling.adapters == "merged":
            return self
        if lora is None:
            raise ValueError(
                "sampling.adapters: there are none to be served; give training.lora, or remove it"
            )
        if not training.adapts_base:
            raise ValueError(
                "sampling.adapters: what is served stands beside the base policy, but each of these adapters beside "
                "the checkpoint before (training.lora.adapter: new); set that to carried, or sampling.adapters to merged"
            )
        if self.method.special_tokens:
            raise ValueError(
                f"sampling.adapters: method {self.method.name} adds tokens, and vLLM takes no trained embeddings from "
                "an adapter; set it to merged"
            )
        if lora.rank > HIGHEST_RANK:
            raise ValueError(
                f"training.lora.rank: vLLM serves adapters of up to {HIGHEST_RANK}, not {lora.rank}; lower it, or set "
                "sampling.adapters to merged"
            )
        heads = sorted(HEADS.intersection(name.rpartition(".")[2] for name in lora.target_modules))
        if lora.target_modules != "all-linear" and heads:
            raise ValueError(
                f"training.lora.target_modules: vLLM gives no log-probabilities of a prompt with an adapter beside "
                f"{heads[0]}; leave it out, or set sampling.adapters to merged"
            )
        return self

    @property
    def sample_scorer(self) -> Scorer | None:
        """What scores the samples, unless a judge does; None: the task itself."""
        return self.scorer or self.task.default_scorer

    @property
    def upstream(self) -> dict[str, Any]:
        """The settings everything upstream of training follows from: shared with a null control."""
        sections = ("task", "policy", "seed", "prompts", "sampling", "evaluation")
        return self.model_dump(mode="json", include=set(sections))
