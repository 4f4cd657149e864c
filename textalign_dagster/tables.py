"""The tables: one polars schema each, with a comment per column. Parquet files hold exactly these columns.

``experiment`` and ``iteration`` of the cell that produced a table are not columns of the files
(a file may be shared by several experiments); the DuckDB views add them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import polars as pl

STATUSES = ("ok", "unparseable", "failed", "skipped")
"""The outcomes of a judgement. Only ``ok`` has a value; the others have a reason."""

PROMPT_DRAWS = pl.Schema(
    {
        "draw_id": pl.String,  # key: hash(seed, iteration, prompt_id, draw_index)
        "prompt_id": pl.String,  # hash of the prompt's text
        "draw_index": pl.Int32,  # 0, 1, … when a prompt is drawn more than once in an iteration
        "prompt": pl.String,
        "reference": pl.String,  # a human answer, if the source has one
        "source": pl.String,
        "source_revision": pl.String,
        "weight": pl.Float64,  # the draw's weight (1.0 unless drawn by a weighted query)
        "seed": pl.Int64,  # the seeds of this draw's samples are derived from it
    }
)

GENERATIONS = pl.Schema(
    {
        "sample_id": pl.String,  # key: hash(draw_id, policy_hash, decoding, condition, seed)
        "draw_id": pl.String,
        "prompt_id": pl.String,
        "prompt": pl.String,
        "sample_index": pl.Int32,  # 0 … samples_per_prompt - 1
        "policy_hash": pl.String,
        "engine": pl.String,
        "engine_version": pl.String,
        "condition": pl.String,  # the feedback the policy is conditioned on; NULL: unconditioned
        "text": pl.String,  # the completion, as decoded
        "n_tokens": pl.Int32,
        "finish_reason": pl.String,  # "stop" (end of sequence) or "length" (cut off)
        "logprob": pl.Float64,  # sum of the sampled tokens' log-probabilities, in nats
        "seed": pl.Int64,
    }
)

FEEDBACK = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "sample_id": pl.String,  # key, with aspect
        "aspect": pl.String,  # what was judged, e.g. "style"
        "kind": pl.String,  # reward | category | text | judgment | rating | ranking
        "value": pl.Float64,  # the number, if there is one; higher is better
        "label": pl.String,  # the category, if there is one
        "text": pl.String,  # the feedback in words, if any
        "status": pl.String,  # one of STATUSES
        "reason": pl.String,  # why it is not ok
        "scorer": pl.String,
        "scorer_version": pl.String,
        "parser_version": pl.String,
        "call_keys": pl.List(pl.String),  # keys into the ledger of judge calls
    }
)

DATAPOOL = pl.Schema(
    {
        "pool_hash": pl.String,
        "sample_id": pl.String,  # key, with pool_hash
        "prompt_id": pl.String,
        "origin": pl.Int32,  # the iteration that sampled it
        "value": pl.Float64,  # the feedback's number, if there is one
        "label": pl.String,  # the bucket; NULL: no usable feedback
        "condition": pl.String,  # the text a training example is conditioned on; NULL: none
        "n_tokens": pl.Int32,
        "weight": pl.Float64,  # of the sample in the objective
        "drawn": pl.Boolean,
        "reason": pl.String,  # why drawn ("quota", "top-up", "fill") or why not
    }
)

SPAN = pl.Struct({"start": pl.Int32, "end": pl.Int32, "score": pl.Float64})
"""A scored span of a text: characters from ``start`` to ``end`` (exclusive); a higher score is worse."""

FEEDBACK_REPEATS = pl.Schema(
    {
        "sample_id": pl.String,  # key, with aspect and repeat
        "aspect": pl.String,
        "repeat": pl.Int32,  # 0, 1, … when the judge is asked the same question several times
        "value": pl.Float64,
        "label": pl.String,
        "status": pl.String,  # one of STATUSES
        "call_key": pl.String,  # key into the ledger of judge calls
    }
)

FEEDBACK_SPANS = pl.Schema(
    {
        "sample_id": pl.String,  # key, with aspect, start and end
        "aspect": pl.String,
        "start": pl.Int32,  # first character of the sample's text
        "end": pl.Int32,  # the character after the last one
        "score": pl.Float64,  # higher is worse
        "label": pl.String,  # what was found there
    }
)

EXAMPLES = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "pool_hash": pl.String,
        "example_id": pl.String,  # key, with pool_hash: hash(sample_id, role, group_id, condition)
        "sample_id": pl.String,
        "role": pl.String,  # "only", "chosen" or "rejected" (of a pair, or on its own), "member" (of a group)
        "group_id": pl.String,  # shared by the examples of a pair or group; NULL: the example is on its own
        "prompt": pl.String,
        "condition": pl.String,  # rendered with the prompt when it is trained on; NULL: none
        "second_prompt": pl.String,  # the text is also read under this prompt; NULL: it is not
        "text": pl.String,
        "finish_reason": pl.String,
        "n_tokens": pl.Int32,
        "weight": pl.Float64,  # in the objective
        "reward": pl.Float64,  # the sample's value, if there is one; higher is better
        "sampled_logprob": pl.Float64,  # of the text under the policy that sampled it, in nats
        "spans": pl.List(SPAN),  # scored spans of the text
    }
)

REFERENCE_LOG_PROBS = pl.Schema(
    {  # type: ignore[arg-type]
        "policy_hash": pl.String,  # key, with tokens_hash: the reference
        "tokens_hash": pl.String,  # hash of the token ids of prompt and text
        "sample_id": pl.String,
        "log_prob": pl.Float64,  # sum over the text's tokens, in nats
        "log_probs": pl.List(pl.Float32),  # of each token of the text
    }
)

CHECKPOINTS = pl.Schema(
    {
        "policy_hash": pl.String,  # key: content hash of weights, config and tokenizer
        "parent": pl.String,  # policy_hash the training started from
        "reference": pl.String,  # policy_hash of the KL reference, NULL without KL
        "pool_hash": pl.String,
        "config": pl.String,  # JSON: method and training settings
        "code_revision": pl.String,
        "environment_hash": pl.String,
        "seed": pl.Int64,
        "rows": pl.Int64,
        "steps": pl.Int64,
        "final_loss": pl.Float64,
        "seconds": pl.Float64,
        "gpu_seconds": pl.Float64,
        "usd": pl.Float64,
    }
)

SCORES = pl.Schema(
    {
        "policy_hash": pl.String,  # key, with subject, metric and condition
        "subject": pl.String,  # a baseline's or a scenario's name; NULL: the experiment's own policy
        "metric": pl.String,
        "condition": pl.String,  # the feedback the policy is conditioned on; NULL: unconditioned
        "role": pl.String,  # "main" (as the policy is meant to be used), "probe", "baseline" or "scenario"
        "n": pl.Int64,  # prompts (the unit that is resampled)
        "value": pl.Float64,
        "lo": pl.Float64,
        "hi": pl.Float64,
    }
)

MEASURES = pl.List(pl.Struct({"name": pl.String, "value": pl.Float64}))
"""Named numbers of a row. A list, not a struct with one field per name, so that the type is the same
whatever the task and experiments can be read together. The DuckDB views show it as a
``MAP(VARCHAR, DOUBLE)``: ``measures['errors']``. See `measures` and `measure`."""

CANDIDATES = pl.Schema(
    {
        "candidate_id": pl.String,  # key
        "prompt_id": pl.String,
        "text": pl.String,
        "score": pl.Float64,  # by the ranker, higher is better; NULL: the text could not be scored
    }
)
"""The samples that best-of-n chooses from, in the order they were drawn."""

REWARDS = pl.Schema(
    {
        "sample_id": pl.String,  # key
        "prompt_id": pl.String,
        "value": pl.Float64,  # of the feedback, higher is better; NULL: unusable, or there is none
        "reward": pl.Float64,  # of the trained reward model; NULL: the sample could not be scored
    }
)

EVALUATION_SAMPLES = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "policy_hash": pl.String,
        "sample_id": pl.String,
        "prompt_id": pl.String,
        "prompt": pl.String,
        "condition": pl.String,
        "role": pl.String,
        "text": pl.String,
        "n_tokens": pl.Int32,
        "finish_reason": pl.String,
        "measures": MEASURES,  # the task's per-sample numbers (their names differ by task)
    }
)


SCENARIO_SAMPLES = pl.Schema([("scenario", pl.String()), *EVALUATION_SAMPLES.items()])
"""The samples of `evaluation.scenarios`, with their measures."""


RED_TEAM = pl.Schema(
    {
        "prompt_id": pl.String,  # key
        "prompt": pl.String,
        "round": pl.Int32,  # the round in which it was written; 0: given
        "value": pl.Float64,  # mean of the first measure of its completions; NULL: none could be measured
        "samples": pl.Int64,  # completions with a value
        "worst": pl.String,  # the worst of them
    }
)


LM_EVAL = pl.Schema(
    {
        "task": pl.String,  # key, with metric; a task or a group
        "metric": pl.String,
        "value": pl.Float64,
        "stderr": pl.Float64,
        "n": pl.Int64,  # questions; NULL: a group
        "fewshot": pl.Int64,
        "version": pl.String,  # of the task
    }
)


def measures(rows: Iterable[Mapping[str, float | int | bool | None]]) -> pl.Series:
    """The column ``measures`` from one mapping (name → number, or None: not measured) per row."""
    lists = [[{"name": n, "value": None if v is None else float(v)} for n, v in row.items()] for row in rows]
    return pl.Series("measures", lists, dtype=MEASURES)


def measure(name: str) -> pl.Expr:
    """One of the measures as a column of that name; NULL where it was not measured."""
    named = pl.element().struct.field("name") == name
    values = pl.element().filter(named).struct.field("value")
    return pl.col("measures").list.eval(values).list.first().alias(name)


def conform(frame: pl.DataFrame, schema: pl.Schema, name: str) -> pl.DataFrame:
    """The frame with exactly the schema's columns, cast and in order.

    Raises:
        ValueError: columns are missing or unknown; the message names the table and the columns.
    """
    missing = [c for c in schema if c not in frame.columns]
    extra = [c for c in frame.columns if c not in schema]
    if missing or extra:
        raise ValueError(f"table {name}: missing columns {missing}, unknown columns {extra}")
    return frame.select(pl.col(c).cast(t) for c, t in schema.items())
