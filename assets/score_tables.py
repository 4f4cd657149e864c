"""The tables of an evaluation: scores and samples, after sampling, scoring and judging."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import polars as pl

from assets import best_of_n
from assets.lm_eval import lm_eval_scores
from assets.measuring import Measuring, Seconds
from assets.numbers import UNJUDGED, by_task, tables
from assets.red_team import red_team_scores
from assets.reward_model import rewarded_samples
from assets.scenarios import scenario_scores, shown_samples
from assets.subjects import Subject
from assets.verdicts import Judging, judged, readable_failures, scored
from resources.store import Draft
from textalign_dagster.experiment.evaluation import evaluation_scorer
from textalign_dagster.measures.reward_models import reward_model_scores
from textalign_dagster.reports.obedience import obedience
from textalign_dagster.reports.score_table import (
    KL_REFERENCE,
    OBEDIENCE,
    reported,
    score_row,
    text_statistics,
)
from textalign_dagster.tables import CANDIDATES, EVALUATION_SAMPLES, REWARDS, SCORES


def write(
    measuring: Measuring,
    draft: Draft,
    subjects: Sequence[Subject],
    seconds: Seconds,
    candidates: Subject | None = None,
    scenarios: Sequence[Subject] = (),
) -> None:
    """Writes the tables of an evaluation of these subjects, of the best of a policy's candidates, and of scenarios."""
    frames = [measuring.samples(subject) for subject in subjects]
    scores: list[pl.DataFrame] = []
    settings, judging = measuring.experiment.evaluation, Judging(measuring.stage, draft)
    if candidates is not None and settings.best_of_n is not None:
        with seconds.of("ranking"):
            ranked = best_of_n.ranked(
                measuring.stage, measuring.sampler, measuring.samples(candidates), judging
            )
        listed = ranked.select("prompt_id", "text", candidate_id="sample_id", score="rank_score")
        draft.write("candidates", listed.select(*CANDIDATES), CANDIDATES)
        for n in settings.best_of_n.n:
            estimated = best_of_n.score_rows(ranked, n, candidates.policy_hash, settings.resamples)
            scores.append(pl.DataFrame(list(estimated), SCORES))
            subjects = [*subjects, replace(candidates, name=best_of_n.NAME.format(n=n))]
            frames.append(best_of_n.best(ranked, n))
    sampled = pl.concat(frames)
    shown = [shown_samples(measuring, subject) for subject in scenarios]
    with seconds.of("scoring"):  # all at once, because a scorer can be a model
        every = pl.concat([sampled, *shown]).with_columns(**UNJUDGED)
        every, facts = scored(measuring.stage, measuring.sampler, every)
        draft.record(**facts)
    samples = every.head(sampled.height)
    with seconds.of("judging"):
        samples = judged(measuring.stage, samples, judging, draft)
        judging.write()
    kept: list[pl.DataFrame] = []
    with seconds.of("measuring"):
        for subject, frame in zip(subjects, frames, strict=True):
            own = frame.select("sample_id").join(samples, on="sample_id", maintain_order="left")
            table, numbered = tables(measuring, subject, own, by_task(measuring.experiment, own))
            scores += [table, *_obedience(measuring, subject, numbered, table)]
            if settings.text_statistics:
                scorer = evaluation_scorer(measuring.experiment)
                better = "lower" if scorer is None else scorer.better
                scores.append(text_statistics(own, subject.policy_hash, subject.name, better))
            # Best-of-n is not a language model, and neither is a reward model.
            if (
                measuring.subjects.reference is not None
                and subject.reward_model is None
                and subject.prompts is None
            ):
                scores.append(_divergence(measuring, subject))
            kept.append(numbered)
            if subject.reward_model is not None:
                rewarded = rewarded_samples(measuring.stage, measuring.sampler, subject.reward_model, own)
                draft.write("rewards", rewarded.rows.select(*REWARDS), REWARDS)
                agreement = reward_model_scores(
                    rewarded.rows,
                    settings.resamples,
                    repeats=rewarded.repeats,
                    comparisons=rewarded.pairs,
                )
                rows = [score_row(name, found, subject.policy_hash) for name, found in agreement]
                scores.append(pl.DataFrame(rows, SCORES))
    if scenarios:
        with seconds.of("scenarios"):
            of_scenarios = every.slice(sampled.height)
            scores += scenario_scores(measuring, draft, scenarios, [s.height for s in shown], of_scenarios)
    if settings.red_team is not None:
        with seconds.of("red team"):
            scores.append(red_team_scores(measuring, draft, subjects[0]))
    if settings.lm_eval is not None:
        with seconds.of("lm_eval"), readable_failures(measuring.stage):
            scores.append(lm_eval_scores(measuring, draft, subjects[0]))
    draft.write("scores", pl.concat(scores), SCORES)
    draft.write("evaluation_samples", pl.concat(kept), EVALUATION_SAMPLES)
    draft.record(work_seconds=sum(seconds.parts.values()), part_seconds=seconds.parts)


def _obedience(
    measuring: Measuring, subject: Subject, samples: pl.DataFrame, scores: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """A row of SCORES if there are several conditions: by the task's first measure, or the score."""
    probed = set(scores.filter(role="probe")["metric"])
    candidates = [
        *reported(measuring.experiment)[:1],
        *(m for m in reported(measuring.experiment) if m.name == "score"),
    ]
    by = next((measure for measure in candidates if measure.name in probed), None)
    if by is None:
        return
    resamples = measuring.experiment.evaluation.resamples
    found = obedience(samples, measuring.experiment.method, by, resamples=resamples)
    if found.value is not None:
        row = score_row(OBEDIENCE, found, subject.policy_hash, condition=subject.asked[0].condition)
        yield pl.DataFrame([row], SCORES)


def _divergence(measuring: Measuring, subject: Subject) -> pl.DataFrame:
    """A row of SCORES: how far a subject is from the reference; none for human answers."""
    if subject.model is None:
        return pl.DataFrame(schema=SCORES)
    asked = subject.asked[0]
    about = {"subject": subject.name, "role": asked.role, "condition": asked.condition}
    found = measuring.divergence.of(subject.model, asked)
    return pl.DataFrame([score_row(KL_REFERENCE, found, subject.policy_hash, **about)], SCORES)
