"""Samples before an LLM judge: rendered, asked through the ledger, read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl

from resources.judge_client import Call, Forecast, Tally, forecast, judge_calls
from resources.ledger import Ledger
from resources.store import ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.judge_settings import Judge
from textalign_dagster.judging import Item, Reply, Template, load_template, parse, single_call
from textalign_dagster.judging.rows import feedback_rows


def judge_of(experiment: Experiment) -> Judge:
    """The experiment's judge, which it must have."""
    if experiment.judge is None:
        raise ValueError("the experiment names no judge")
    return experiment.judge


def ask_judge(
    experiment: Experiment,
    samples: pl.DataFrame,
    store: ArtifactStore,
    report: Callable[..., None],
    purpose: str,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The judge's verdicts on samples.

    Args:
        samples: sample_id, prompt, text.
        purpose: written into the ledger beside each call, e.g. the cell.

    Returns:
        Rows of FEEDBACK, one a sample, and what it came to: calls, usd, ….

    Raises:
        JudgeError: the endpoint refuses, or the budget is spent. What was paid for is kept; the same
            again goes on from there.
    """
    judge = judge_of(experiment)
    template = load_template(judge.template)
    tally = Tally()
    with Ledger(store) as ledger:
        replies = judge_calls(judge_questions(template, samples, purpose), judge, ledger, report, tally=tally)
    verdicts = [
        parse(template, Reply(reply.text, reply.refusal, reply.finish_reason, reply.error))
        for reply in replies
    ]
    keys = [[reply.call_key] for reply in replies]
    rows = feedback_rows(template, judge.model, samples["sample_id"].to_list(), verdicts, keys)
    facts = {
        "calls": tally.requests,
        "usd": tally.usd,
        "calls_lost": tally.lost,
        "calls_cached": tally.cached,
    }
    return rows, facts


def judge_questions(template: Template, samples: pl.DataFrame, purpose: str) -> list[Call]:
    """The calls that judge samples, one each, in their order."""
    questions = (
        single_call(template, Item(prompt, text))
        for prompt, text in samples.select("prompt", "text").iter_rows()
    )
    return [
        Call(question.messages, response_format=question.response_format, purpose=purpose)
        for question in questions
    ]


def forecast_of(experiment: Experiment, samples: pl.DataFrame, store: ArtifactStore) -> Forecast:
    """What judging these samples would take, and what of it is paid already."""
    judge = judge_of(experiment)
    with Ledger(store) as ledger:
        return forecast(judge_questions(load_template(judge.template), samples, ""), judge, ledger)
