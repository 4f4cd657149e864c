"""What the columns of the tables mean, as the UI's Columns section shows it."""

from __future__ import annotations

from typing import Any

import dagster as dg
import polars as pl

MEANINGS = {
    "aspect": "What was judged, e.g. style.",
    "call_keys": "Keys of rows in the ledger of judge calls.",
    "call_key": "Key of a row in the ledger of judge calls.",
    "candidate_id": "One of the samples that best-of-n chooses from.",
    "code_revision": "Revision of the code that trained.",
    "condition": "The feedback that the sample is conditioned on; NULL: none.",
    "config": "JSON: the training settings.",
    "draw_id": "One drawn prompt; a prompt drawn twice has two.",
    "draw_index": "0, 1, … if a prompt is drawn more than once in an iteration.",
    "drawn": "Whether the row is trained on.",
    "engine": "The engine that sampled.",
    "engine_version": "Version of the engine.",
    "end": "The character after the last one, from 0.",
    "environment_hash": "Hash of the installed packages.",
    "example_id": "One example; a sample can be in several.",
    "fewshot": "Few-shot examples before each question.",
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
    "n": "Number of prompts, which the interval resamples.",
    "n_tokens": "Sampled tokens, including an end token.",
    "origin": "The iteration that sampled it.",
    "parent": "The policy that training started from.",
    "parser_version": "Version of the parser of the judge's reply.",
    "policy_hash": "The policy: hash of its weights, config and tokenizer.",
    "pool_hash": "The pool: hash of its inputs and settings.",
    "prompt": "The prompt, without the condition.",
    "prompt_id": "Hash of the prompt's text.",
    "reason": "Why drawn or not; why feedback is not ok.",
    "reference": "A human answer, where the source has one.",
    "reward": "The sample's value, where there is one; higher is better.",
    "role": "main: as the policy is meant to be used; probe: under another condition; baseline: another model; "
    "scenario: sampled in another way.",
    "repeat": "0, 1, … if the judge was asked a question several times.",
    "round": "The round that wrote the prompt; 0: given in the file.",
    "rows": "Rows trained on.",
    "sampled_logprob": "Log-probability of the text under the policy that sampled it, in nats.",
    "sample_id": "One sample; joins generations, feedback and datapool.",
    "samples": "Number of completions with a value.",
    "sample_index": "0, 1, … within a drawn prompt.",
    "score": "Score of the characters; higher is worse.",
    "scenario": "A way to sample the policy.",
    "scorer": "The scorer or judge.",
    "scorer_version": "Version of the scorer or judge.",
    "second_prompt": "The text is also trained on under this prompt; NULL: it is not.",
    "seconds": "Wall time.",
    "seed": "Derived from experiment, iteration and row.",
    "source": "Where the prompt comes from.",
    "source_revision": "Version of the source.",
    "spans": "Scored spans of the text: start, end, score.",
    "start": "The first character, from 0.",
    "status": "ok, unparseable, failed or skipped; only ok rows carry a value.",
    "stderr": "Standard error of the value.",
    "steps": "Updates of the weights.",
    "subject": "A baseline's or a scenario's name; NULL: the experiment's own policy.",
    "task": "A task of lm-evaluation-harness.",
    "text": "What the policy, or the judge, wrote.",
    "tokens_hash": "Hash of the token ids of prompt and text.",
    "usd": "Money spent; NULL: not known.",
    "value": "The number; in feedback, higher is better.",
    "version": "Version of the task.",
    "weight": "Weight of the row in the draw (prompts) or in the objective (datapool).",
    "worst": "The worst completion.",
}


def columns_of(schema: pl.Schema) -> dict[str, Any]:
    """Static asset metadata that fills the UI's Columns section."""
    columns = [dg.TableColumn(name, str(kind), description=MEANINGS[name]) for name, kind in schema.items()]
    return {"dagster/column_schema": dg.TableSchema(columns=columns)}
