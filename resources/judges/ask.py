"""Judges samples: questions from a template, replies through the ledger, verdicts parsed from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import polars as pl

from resources.judges.call import Call, Tally
from resources.judges.client import judge_calls
from resources.judges.forecast import Forecast, forecast
from resources.judges.ledger import Ledger
from resources.store import ArtifactStore
from textalign_dagster.experiment.evaluation_settings import JUDGED
from textalign_dagster.judging import Answer, Judged, Question, Reply, asking
from textalign_dagster.methods import FeedbackKind
from textalign_dagster.settings.judge import Judge


def ask_judge(
    judge: Judge,
    samples: pl.DataFrame,
    *,
    kind: FeedbackKind | None,
    store: ArtifactStore,
    report: Callable[..., None],
    purpose: str,
    retry_before: datetime | None = None,
) -> Judged:
    """The judge's verdicts on samples, for any ``ask``.

    Args:
        samples: sample_id, prompt_id, prompt, reference, text; one row per sample.
        kind: the kind of feedback the method needs; None: any.
        purpose: stored in the ledger with each call, e.g. the cell.
        retry_before: calls that were given up before this time are sent again.

    Raises:
        JudgeError: the endpoint refuses or is down, or the budget is spent. Replies are kept; the next run
            resumes.
        SettingsError: the judge's template cannot be used.
        ValueError: the judge cannot give feedback of that kind.
    """
    if kind is not None and kind not in JUDGED.get(judge.ask, ()):
        raise ValueError(f"a judge with ask {judge.ask!r} gives no feedback of kind {kind!r}")
    asked = asking(judge, samples)
    tally = Tally()
    with Ledger(store) as ledger:
        calls = [_call(question, purpose) for question in asked.questions]
        replies = judge_calls(calls, judge, ledger, report, tally=tally, retry_before=retry_before)
    answers = [
        Answer(Reply(reply.text, reply.refusal, reply.finish_reason, reply.error), reply.call_key)
        for reply in replies
    ]
    facts = {
        "calls": tally.requests,
        "usd": tally.usd,
        "calls_lost": tally.lost,
        "calls_cached": tally.cached,
        "reply_models": dict(Counter(reply.model for reply in replies if reply.model is not None)),
    }
    return replace(asked.judged(answers), facts=facts)


def forecast_judging(judge: Judge, samples: pl.DataFrame, store: ArtifactStore) -> Forecast:
    """The calls, tokens and cost of judging these samples; sends nothing.

    Args:
        samples: as for :func:`ask_judge`.
    """
    with Ledger(store) as ledger:
        return forecast([_call(question, "") for question in asking(judge, samples).questions], judge, ledger)


def _call(question: Question, purpose: str) -> Call:
    return Call(
        question.call.messages,
        repeat=question.repeat,
        response_format=question.call.response_format,
        order_shown=question.order_shown,
        purpose=purpose,
    )
