"""Samples before an LLM judge: asked through the ledger, read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import polars as pl

from resources.judges.client import Call, Forecast, Tally, forecast, judge_calls
from resources.judges.ledger import Ledger
from resources.store import ArtifactStore
from textalign_dagster.experiment.experiment import JUDGED
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
) -> Judged:
    """The judge's verdicts on samples, whatever it is asked.

    Args:
        samples: sample_id, prompt_id, prompt, reference, text; one row a sample.
        kind: what a method wants of it; None: whatever the judge says is welcome.
        purpose: written into the ledger beside each call, e.g. the cell.

    Raises:
        JudgeError: the endpoint refuses, or the budget is spent. What was paid for is kept; the same
            again goes on from there.
        SettingsError: the judge's template cannot be used.
        ValueError: the judge cannot give feedback of that kind.
    """
    if kind is not None and kind not in JUDGED.get(judge.ask, ()):
        raise ValueError(f"a judge asked for {judge.ask!r} gives no feedback of kind {kind!r}")
    asked = asking(judge, samples)
    tally = Tally()
    with Ledger(store) as ledger:
        calls = [_call(question, purpose) for question in asked.questions]
        replies = judge_calls(calls, judge, ledger, report, tally=tally)
    answers = [
        Answer(Reply(reply.text, reply.refusal, reply.finish_reason, reply.error), reply.call_key)
        for reply in replies
    ]
    facts = {
        "calls": tally.requests,
        "usd": tally.usd,
        "calls_lost": tally.lost,
        "calls_cached": tally.cached,
    }
    return replace(asked.judged(answers), facts=facts)


def forecast_judging(judge: Judge, samples: pl.DataFrame, store: ArtifactStore) -> Forecast:
    """What judging these samples would take, and what of it is paid already; calls nobody.

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
