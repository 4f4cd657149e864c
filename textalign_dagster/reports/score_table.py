"""The score table: every metric of a policy under every condition, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Literal

import polars as pl

from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import DISTINCT_BLOCK, evaluation_scorer
from textalign_dagster.measures import best_of_n, reward_models, rouge, statistics
from textalign_dagster.measures.bootstrap import Per
from textalign_dagster.measures.diversity import distinct_n_blocks, ngram_entropy, self_bleu
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.tables import SCORES, conform
from textalign_dagster.tasks import Measure

GUARDS: tuple[Measure, ...] = (
    Measure("distinct_3", "distinct-3", "text"),
    Measure("perplexity", "perplexity under the base policy", "nll", "nll_tokens"),
    Measure("n_tokens", "tokens", "n_tokens"),
)
"""Measures that every task reports, to expose false gains: collapse, drift, shortening."""

PERPLEXITY_MEAN = Measure("perplexity_mean", "mean of samples' perplexities", "nll", "nll_tokens")
"""The published form: reported alongside ours if a model other than the base policy measures fluency."""

OBEDIENCE = "obedience"
"""Spearman's correlation of condition and result: one number for all conditions together."""

TEXT_STATISTICS = {
    "entropy_1": "entropy of 1-grams",
    "entropy_2": "entropy of 2-grams",
    "self_bleu_5": "Self-BLEU-5",
    "worst_of_25": "mean of the worst score of 25",
}
"""Metric → title of what `evaluation.text_statistics` adds."""

WORST = {"worst": "the worst sample", "worst_of_25": "the worst of 25", "hits": "hits"}
"""Metric → title of what a scenario adds, by the first measure of each sample."""

RED_TEAM = {
    "red_team_worst": "the worst prompt",
    "red_team_worst_10": "the ten worst prompts",
    "red_team_pool": "all prompts tried",
}
"""Metric → title of what `evaluation.red_team` adds: means over prompts of the first measure."""

RED_TEAM_SUBJECT, LM_EVAL_SUBJECT = "red team", "lm_eval"
"""The subjects of the rows of SCORES from red-teaming and from the harness."""

KL_REFERENCE = "kl_reference"
"""KL(reference || policy) in nats per text, added by `evaluation.kl_reference`."""


def reported(experiment: Experiment) -> tuple[Measure, ...]:
    """The measures an evaluation reports, in order: the task's own, those of scorer and judge (first, if the task
    leaves judging to them), the guards.

    Measures without data are left out of the score table.
    """
    task, settings = experiment.task.measures, experiment.evaluation
    guards = GUARDS
    if settings.fluency_model is not None:
        under = f"perplexity under {PurePath(settings.fluency_model).name}"
        guards = tuple(replace(m, title=under) if m.name == "perplexity" else m for m in GUARDS)
        guards += (PERPLEXITY_MEAN,)
    scorer = evaluation_scorer(experiment)
    extra = []
    if scorer is not None and not any(measure.numerator == "score" for measure in task):
        extra.append(Measure("score", f"{scorer.name} score", "score", better=scorer.better))
    if settings.judge is not None:
        won = settings.judge.ask == "win"
        name, title = ("win_rate", "win rate") if won else ("judge_score", "judge's score")
        extra.append(Measure(name, title, "judge_value", better="higher"))
        extra.append(Measure("judge_unusable", "unusable judgements", "judge_unusable", better="lower"))
    if settings.rouge:
        titled = zip(rouge.NAMES, ("ROUGE-1", "ROUGE-2", "ROUGE-L"), strict=True)
        extra += [Measure(name, title, name, better="higher") for name, title in titled]
    named = {measure.name for measure in task}
    others = [measure for measure in extra if measure.name not in named]
    ordered = (*others, *task) if experiment.task.judged_by_others else (*task, *others)
    return (*ordered, *(measure for measure in guards if measure.name not in named))


def titles(experiment: Experiment) -> Mapping[str, str]:
    """Metric → title, in the order in which they are reported."""
    found = {measure.name: measure.title for measure in reported(experiment)}
    trained = reward_models.TITLES if experiment.method.trains == "reward model" else {}
    ranked = {} if experiment.evaluation.best_of_n is None else best_of_n.TITLES
    texts = TEXT_STATISTICS if experiment.evaluation.text_statistics else {}
    worst = WORST if experiment.evaluation.scenarios else {}
    attacks = RED_TEAM if experiment.evaluation.red_team is not None else {}
    reference = experiment.evaluation.kl_reference
    under = "the base policy" if reference == "base" else PurePath(reference or "").name
    apart = {} if reference is None else {KL_REFERENCE: f"KL from {under} (nats per text)"}
    return {**trained, **found, **texts, **worst, **attacks, **apart, OBEDIENCE: "obedience", **ranked}


def text_statistics(
    samples: pl.DataFrame,
    policy_hash: str,
    subject: str | None = None,
    better: Literal["lower", "higher"] = "lower",
) -> pl.DataFrame:
    """Rows of SCORES for :data:`TEXT_STATISTICS`; numbers computed over all texts together have no interval.

    Args:
        samples: prompt_id, role, text, score; probes are ignored.
        better: which scores are better.
    """
    shown = samples.filter(pl.col("role") != "probe")
    texts, prompts = shown["text"].to_list(), shown["prompt_id"].n_unique()
    worst = statistics.worst_of(shown["score"].to_list(), better)
    values = (ngram_entropy(texts, 1), ngram_entropy(texts, 2), self_bleu(texts), worst)
    role = shown["role"][0] if texts else "main"
    rows = [
        score_row(
            name, Estimate(value, None, None, prompts, len(texts)), policy_hash, subject=subject, role=role
        )
        for name, value in zip(TEXT_STATISTICS, values, strict=True)
        if value is not None
    ]
    return pl.DataFrame(rows, SCORES)


def score_table(
    samples: pl.DataFrame,
    measured: pl.DataFrame,
    measures: Sequence[Measure],
    *,
    policy_hash: str,
    resamples: int,
    subject: str | None = None,
) -> pl.DataFrame:
    """The scores of a policy, with 95 % intervals from resampling prompts.

    Args:
        samples: sample_id, prompt_id, condition, role, text, n_tokens, nll and nll_tokens
            (NULL where not computed), and any other columns that ``measures`` name.
        measured: sample_id and the columns that ``measures`` name; they override those of ``samples``.
        subject: a baseline's name; None: the experiment's own policy.

    Returns:
        Rows of :data:`textalign_dagster.tables.SCORES`: every measure that has data, for every condition.
    """
    joined = with_numbers(samples, measured)
    rows = []
    groups = joined.partition_by("role", "condition", as_dict=True, maintain_order=True)
    for (role, condition), group in groups.items():
        for measure in measures:
            found = _estimate(group, measure, resamples)
            if found.value is not None:
                rows.append(
                    score_row(
                        measure.name, found, policy_hash, subject=subject, condition=condition, role=role
                    )
                )
    return conform(pl.DataFrame(rows, schema=SCORES), SCORES, "scores")


def with_numbers(samples: pl.DataFrame, measured: pl.DataFrame) -> pl.DataFrame:
    """Samples with the numbers of :meth:`Task.measure`, which override columns of the same name."""
    own = samples.select(c for c in samples.columns if c == "sample_id" or c not in measured.columns)
    # In the samples' order: resampling and blocks depend on it.
    return own.join(measured, on="sample_id", maintain_order="left")


def sample_values(samples: pl.DataFrame, measure: Measure) -> pl.Series:
    """A measure, sample by sample; NULL where it is undefined."""
    values = samples[measure.numerator].cast(pl.Float64) * measure.scale  # a column without data has no type
    if measure.denominator is None:
        return values
    counts = samples[measure.denominator].cast(pl.Float64)
    return pl.select(pl.when(counts != 0).then(values / counts)).to_series()


def score_row(
    metric: str,
    found: Estimate,
    policy_hash: str,
    *,
    subject: str | None = None,
    condition: Any = None,
    role: Any = "main",
) -> dict[str, Any]:
    """A row of SCORES."""
    return {
        "policy_hash": policy_hash,
        "subject": subject,
        "metric": metric,
        "condition": condition,
        "role": role,
        "n": found.n,
        "value": found.value,
        "lo": found.lo,
        "hi": found.hi,
    }


def _estimate(group: pl.DataFrame, measure: Measure, resamples: int) -> Estimate:
    ids = group["prompt_id"].to_list()
    if measure.name == "distinct_3":
        return distinct_n_blocks(group["text"].to_list(), ids, 3, block=DISTINCT_BLOCK, resamples=resamples)
    if measure.name in ("perplexity", "perplexity_mean"):
        nll, tokens = group["nll"].to_list(), group["nll_tokens"].to_list()
        how = statistics.perplexity if measure.name == "perplexity" else statistics.perplexity_mean
        return how(nll, tokens, ids, resamples=resamples)
    if measure.denominator is None or measure.per_prompt == "max":
        per: Per = "prompt_max" if measure.per_prompt == "max" else "sample"
        return statistics.mean(sample_values(group, measure).to_list(), ids, per, resamples=resamples)
    values = group[measure.numerator].cast(pl.Float64) * measure.scale
    counts = group[measure.denominator].cast(pl.Float64)
    sums = statistics.ratio_sums(values.to_list(), counts.to_list(), ids)
    return statistics.estimate(sums, resamples=resamples)


def value_of(scores: pl.DataFrame, metric: str, role: str = "main") -> float | None:
    """One value of a score table; None if it is missing."""
    found = scores.filter((pl.col("metric") == metric) & (pl.col("role") == role))["value"]
    return float(found[0]) if len(found) else None
