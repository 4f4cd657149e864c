"""lm-evaluation-harness on the policy that an iteration trained."""

from __future__ import annotations

import polars as pl

from assets.measuring import Measuring
from assets.subjects import Subject
from resources import lm_eval
from resources.store import Artifact, Draft
from textalign_dagster.loop.stages import EVALUATION_LM_EVAL
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.reports.score_table import LM_EVAL_SUBJECT, score_row
from textalign_dagster.tables import LM_EVAL, SCORES


def harnessed(measuring: Measuring, subject: Subject) -> Artifact:
    """The harness's metrics of a policy: a table of LM_EVAL, stored separately."""
    experiment, model = measuring.experiment, subject.model
    settings = experiment.evaluation.lm_eval
    assert settings is not None and model is not None, "only for policies, if it is set"

    def produce(draft: Draft) -> None:
        measuring.sampler.make_room()
        found = lm_eval.run(
            settings,
            model.path,
            experiment.policy.dtype,
            trust_remote_code=experiment.policy.trust_remote_code,
            seed=experiment.seed,
        )
        draft.write("lm_eval", found, LM_EVAL)

    given = {**lm_eval.identity(settings), "dtype": experiment.policy.dtype, "seed": experiment.seed}
    return measuring.kept(EVALUATION_LM_EVAL, given, {"policy": subject.policy_hash}, produce)


def lm_eval_scores(measuring: Measuring, draft: Draft, subject: Subject) -> pl.DataFrame:
    """Writes the metrics, and returns them as rows of SCORES; intervals are 1.96 standard errors wide on each side."""
    found = harnessed(measuring, subject).frame("lm_eval")
    draft.write("lm_eval", found, LM_EVAL)
    rows = []
    for task, metric, value, error, n in found.select("task", "metric", "value", "stderr", "n").iter_rows():
        lo, hi = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
        estimate = Estimate(value, lo, hi, n or 0, n or 0)
        row = score_row(
            f"{task} {metric}", estimate, subject.policy_hash, subject=LM_EVAL_SUBJECT, role="scenario"
        )
        rows.append(row)
    return pl.DataFrame(rows, SCORES)
