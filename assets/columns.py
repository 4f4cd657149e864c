"""What the columns of the tables mean, as the UI's Columns section shows it."""

from __future__ import annotations

from typing import Any

import dagster as dg
import polars as pl

MEANINGS = {
    "aspect": "What was judged, e.g. style.",
    "call_keys": "Rows of the ledger of judge calls.",
    "call_key": "Row of the ledger of judge calls.",
    "candidate_id": "One sample that best-of-n chooses among.",
    "code_revision": "The code that trained.",
    "condition": "The feedback that the sample is conditioned on; NULL: none.",
    "config": "JSON: the training settings.",
    "draw_id": "One drawn prompt; a prompt drawn twice has two.",
    "draw_index": "0, 1, … when a prompt is drawn more than once in an iteration.",
    "drawn": "Whether the row is trained on.",
    "engine": "What sampled.",
    "engine_version": "Its version.",
    "end": "The character after the last one.",
    "environment_hash": "Hash of the installed packages.",
    "example_id": "One example; a sample can be in several.",
    "fewshot": "Examples before each question.",
    "final_loss": "Mean loss of the last tenth of the steps.",
    "finish_reason": "stop: ended by itself; length: cut off.",
    "gpu_seconds": "Seconds times GPUs; NULL: not measured.",
    "group_id": "Examples of one pair or group share it; NULL: the example stands alone.",
    "hi": "Upper end of the 95 % interval.",
    "kind": "reward, category, text, judgment, rating or ranking.",
    "label": "The bucket or category; NULL: none.",
    "lo": "Lower end of the 95 % interval.",
    "log_prob": "Sum over the text's tokens, in nats.",
    "log_probs": "Log-probability of each token of the text.",
    "logprob": "Sum of the sampled tokens' log-probabilities under the policy, in nats.",
    "metric": "What was measured.",
    "n": "Prompts; they are what the interval resamples.",
    "n_tokens": "Sampled tokens, an end token included.",
    "origin": "The iteration that sampled it.",
    "parent": "The policy that training started from.",
    "parser_version": "What read the judge's reply.",
    "policy_hash": "The policy: hash of its weights, config and tokenizer.",
    "pool_hash": "The pool: hash of its inputs and settings.",
    "prompt": "The prompt, without the condition.",
    "prompt_id": "Hash of the prompt's text.",
    "reason": "Why drawn or not; why feedback is not ok.",
    "reference": "A human answer, where the source has one.",
    "reward": "The sample's value, where there is one; higher is better.",
    "role": "main: as the policy is meant to be used; probe: under another condition; baseline: another model; "
    "scenario: sampled in another way.",
    "repeat": "0, 1, … of a question that the judge was asked several times.",
    "round": "In which the prompt was written; 0: given.",
    "rows": "Rows trained on.",
    "sampled_logprob": "Log-probability of the text under the policy that sampled it, in nats.",
    "sample_id": "One sample; joins generations, feedback and datapool.",
    "samples": "Completions that have a value.",
    "sample_index": "0, 1, … within a drawn prompt.",
    "score": "Of the characters; higher is worse.",
    "scenario": "A way to sample the policy.",
    "scorer": "Who judged.",
    "scorer_version": "Its version.",
    "second_prompt": "The text is read a second time under this prompt; NULL: it is not.",
    "seconds": "Wall time.",
    "seed": "Derived from experiment, iteration and row.",
    "source": "Where the prompt comes from.",
    "source_revision": "Its version.",
    "spans": "Scored stretches of the text: start, end, score.",
    "start": "First character, from 0.",
    "status": "ok, unparseable, failed or skipped; only ok rows carry a value.",
    "stderr": "Standard error of the value.",
    "steps": "Updates of the weights.",
    "subject": "A baseline's or a scenario's name; NULL: the experiment's own policy.",
    "task": "Of lm-evaluation-harness.",
    "text": "What the policy, or the judge, wrote.",
    "tokens_hash": "Hash of the token ids of prompt and text.",
    "usd": "Money spent; NULL: not known.",
    "value": "The number; in feedback, higher is better.",
    "version": "Of the task.",
    "weight": "Of the row in the draw (prompts) or in the objective (datapool).",
    "worst": "The worst completion.",
}


def columns_of(schema: pl.Schema, **meanings: str) -> dict[str, Any]:
    """Static asset metadata that fills the UI's Columns section; ``meanings`` that differ here."""
    columns = [
        dg.TableColumn(name, str(kind), description=meanings.get(name, MEANINGS[name]))
        for name, kind in schema.items()
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=columns)}
