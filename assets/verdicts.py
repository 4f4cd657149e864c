"""Scores and judgements of an evaluation's samples, and judge calls that failed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from assets.stage import Stage
from resources.configured import SamplerResource
from resources.judges.errors import BatchPendingError, JudgeError
from resources.lm_eval import LMEvalError
from resources.rewards.scoring import ScoringError, score_samples
from resources.rewards.trained import located
from resources.store import Artifact, Draft
from textalign_dagster.experiment.evaluation import evaluation_scorer
from textalign_dagster.judging import Judged
from textalign_dagster.judging.pairs import pair_figures
from textalign_dagster.loop.abandoned import BATCHES_TAG
from textalign_dagster.scorers.base import Scorer, TextScorer
from textalign_dagster.tables import FEEDBACK

RETRY = "`textalign run --retry-failed` sends failed calls again"


def scored(
    stage: Stage, sampler: SamplerResource, samples: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """``samples`` with score (and label) of the evaluation's scorer, and the facts to record."""
    scorer = evaluation_scorer(stage.experiment)
    if scorer is None:
        return samples, {}
    facts: dict[str, Any] = {}
    found = scores_of(stage, sampler, samples, scorer, "evaluation.scorer", "scoring", facts)
    facts["unscored"] = int((found["status"] != "ok").sum())
    return samples.with_columns(score=found["score"], label=found["label"]), facts


def scores_of(
    stage: Stage,
    sampler: SamplerResource,
    samples: pl.DataFrame,
    scorer: Scorer,
    field: str,
    note: str,
    facts: dict[str, Any] | None = None,
) -> pl.DataFrame:
    """The scores by the scorer in a field of the experiment, one row per sample; ``facts`` receives what to record."""
    if not isinstance(scorer, TextScorer):
        sampler.make_room()
    columns = ("sample_id", "prompt", "reference", "text", "finish_reason")
    report = partial(stage.report(), note=note)
    with readable_failures(stage, f"{field}: "):
        return score_samples(located(scorer, stage.store), samples.select(columns), report, facts=facts)


class Judging:
    """The LLM judges of one evaluation; their verdicts are written as one table."""

    def __init__(self, stage: Stage, draft: Draft) -> None:
        self._stage, self._draft = stage, draft
        self._rows: list[pl.DataFrame] = []
        self._facts: dict[str, Any] = {}

    def ask(self, field: str, samples: pl.DataFrame, purpose: str) -> Judged:
        """The verdicts on samples by the judge in a field of the experiment.

        Args:
            samples: sample_id, prompt_id, prompt, reference, text.

        Raises:
            dg.Failure: the judge cannot be reached, or too many of its calls failed.
        """
        from resources.judges.ask import ask_judge  # needs the extra `judges`

        stage = self._stage
        with readable_failures(stage, f"{field}: "):
            found = ask_judge(
                stage.experiment.evaluating_judges[field],
                samples.select("sample_id", "prompt_id", "prompt", "reference", "text"),
                kind=None,
                store=stage.store,
                report=stage.report(),
                retry_before=stage.retry_before,
                purpose=f"{stage.cell.key} {purpose}",
            )
        failed = found.rows.filter(status="failed")
        if failed.height > stage.experiment.checks.max_unusable_feedback * found.rows.height:
            raise dg.Failure(
                f"{field}: {failed.height:,} of {found.rows.height:,} judgements failed, e.g. "
                f"{failed['reason'][0]} (limit: checks.max_unusable_feedback); {RETRY}. Samples and replies are kept",
                allow_retries=False,
            )
        self._rows.append(found.rows)
        self._facts = _together(self._facts, found.facts)
        return found

    def write(self) -> None:
        """Writes the verdicts, and what they cost."""
        if self._rows:
            self._draft.write("judgements", pl.concat(self._rows), FEEDBACK)
            self._draft.record(**self._facts)


def _together(facts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The sums of both: numbers and counts of models are added; None if unknown in either."""
    if not facts:
        return more
    known = {name: (facts[name], value) for name, value in more.items() if name != "reply_models"}
    sums = {name: None if None in both else sum(both) for name, both in known.items()}
    return sums | {"reply_models": dict(Counter(facts["reply_models"]) + Counter(more["reply_models"]))}


def judged(stage: Stage, samples: pl.DataFrame, judging: Judging, draft: Draft) -> pl.DataFrame:
    """``samples`` with the verdicts of the evaluation's judge, except on probes; raises as `Judging.ask`."""
    judge = stage.experiment.evaluation.judge
    if judge is None:
        return samples
    asked = samples.filter(pl.col("role") != "probe")
    if judge.ask == "win":  # comparing a reference with itself is meaningless
        asked = asked.filter(~pl.col("by_people"))
    found = judging.ask("evaluation.judge", asked, "evaluation")
    if found.pairs is not None:
        draft.record(comparisons=pair_figures(found.pairs))
    unusable = pl.col("status").is_in(["unparseable", "failed"]).cast(pl.Float64)
    verdicts = found.rows.select(
        "sample_id",
        verdict="label",
        judge_value=pl.when(status="ok").then("value"),
        judge_unusable=pl.when(pl.col("status") != "skipped").then(unusable),
    )
    return (
        samples.drop("judge_value", "judge_unusable")
        .join(verdicts, on="sample_id", how="left", maintain_order="left")
        .with_columns(label=pl.coalesce("verdict", "label"))
    )


def sent_again(stage: Stage, iteration: int) -> dict[str, int]:
    """How often failed judge calls were sent again: each time creates a new artifact, alongside the earlier ones."""
    # Not `stage.freshness`, which caches what it has read: this stage is about to create the artifact.
    pointer = stage.store.pointer(stage.cell.experiment, iteration, stage.name)
    if pointer is None:
        return {}
    made, before = pointer.artifact, stage.retry_before
    times = int(made.manifest["facts"].get("asked_again", 0))
    if before is not None and has_failed(made):
        times += datetime.fromisoformat(made.manifest["created_at"]) < before
    return {"asked_again": times} if times else {}


def has_failed(made: Artifact) -> bool:
    """Whether judgements in an artifact failed."""
    tables = [table for table in ("feedback", "pairs", "judgements") if table in made.tables]
    return any((made.frame(table)["status"] == "failed").any() for table in tables)


@contextmanager
def readable_failures(stage: Stage, where: str = "") -> Iterator[None]:
    """Errors of a judge, a scorer or the harness that users can act on become failures that Dagster does not retry."""
    try:
        yield
    except BatchPendingError as pending:
        # The sensor that collects replies looks for these names.
        stage.context.instance.add_run_tags(stage.context.run.run_id, {BATCHES_TAG: " ".join(pending.jobs)})
        raise dg.Failure(str(pending), allow_retries=False) from None
    except (JudgeError, ScoringError, LMEvalError) as error:
        raise dg.Failure(f"{where}{error}", allow_retries=False) from error
