"""Samples before a scorer: a pure function, a model in a worker process, or a file of judgements.

    rows = score_samples(PIIScorer(), samples, report)

Whatever cannot be scored has a status and a reason, and never a number.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from resources.rewards.folder import find_folder
from resources.workers.channel import Channel, processors
from resources.workers.host import check_host, host_of
from resources.workers.serving import version_of
from textalign_dagster.feedback_files.formats import read_feedback
from textalign_dagster.feedback_files.imported import Imported, of_aspect
from textalign_dagster.scorers import ClassifierScorer, ImportedScorer, ModelScorer, RewardModelScorer, Scorer
from textalign_dagster.scorers.base import TextScorer
from textalign_dagster.scorers.matching import match_judgements
from textalign_dagster.scorers.pii import PIIScorer
from textalign_dagster.scorers.pii_names import load_pipeline
from textalign_dagster.settings import SettingsError

SCORED = pl.Schema(
    {
        "sample_id": pl.String,
        "score": pl.Float64,  # in the scorer's own direction; NULL unless ok
        "value": pl.Float64,  # higher is better; NULL unless ok
        "text": pl.String,  # feedback in words, where there is any
        "label": pl.String,  # the category, where there is one
        "status": pl.String,
        "reason": pl.String,  # why not ok
    }
)

PARALLEL_FROM = 20_000_000
"""Characters from which worker processes pay: they start in 2 to 5 s, and one processor takes 8 s (PII) to 12 s
(toxicity) for that many (measured on two cores; counting patterns takes 1 s and hardly gains)."""

CHUNK = 1_000_000
"""Characters that a worker process is given at a time."""

Report = Callable[..., None]
"""Called with (done, total)."""


class ScoringError(RuntimeError):
    """Scoring cannot be done; the message is one readable sentence (or two) with the remedy."""


def score_samples(
    scorer: Scorer,
    samples: pl.DataFrame,
    report: Report,
    *,
    iteration: int | None = None,
    facts: dict[str, Any] | None = None,
) -> pl.DataFrame:
    """The scores of samples, one row each, in their order.

    Args:
        samples: sample_id, prompt (without a condition), reference, text, finish_reason.
        report: called with (done, total).
        iteration: of the samples; scorers that read a file an iteration need it.
        facts: gets what is worth recording, e.g. the accuracy that a model was checked to have.

    Returns:
        Rows of :data:`SCORED`.

    Raises:
        ScoringError: a model or file is missing, cannot be used, or fails its check.
    """
    collected: dict[str, Any] = {} if facts is None else facts
    if samples.is_empty():
        return pl.DataFrame(schema=SCORED)
    if isinstance(scorer, TextScorer):
        try:
            return _by_function(scorer, samples, report)
        except SettingsError as error:
            raise ScoringError(f"scorer {scorer.name}: {error}") from None
    if isinstance(scorer, ModelScorer):
        return _by_model(scorer, samples, report, collected)
    if isinstance(scorer, ImportedScorer):
        return _from_file(scorer, samples, iteration, collected)
    raise ScoringError(f"scorer {scorer.name} is of no kind that can be run here")


def inspect_scorer(scorer: Scorer, field: str = "scorer") -> str:
    """What can be known of a scorer before it is asked, on a line; for ``textalign validate``.

    A hub model is fetched. A file of judgements may be missing: people write it after the sampling.

    Raises:
        SettingsError: its model, the pairs that check it, or the cluster it is to run on cannot be had.
    """
    found = f"{field}: {scorer.name} ({scorer.version})"
    if isinstance(scorer, ImportedScorer):
        return f"{found}, from {scorer.path}"
    if isinstance(scorer, PIIScorer) and scorer.names is not None:
        try:
            load_pipeline(scorer.names)
        except SettingsError as error:
            raise SettingsError(f"{field}.{error}") from None
    if not isinstance(scorer, ModelScorer) or scorer.trained is not None:
        return found
    try:
        settings, _ = _settings_of(scorer)
        pairs = 0 if scorer.check is None else len(read_pairs(Path(scorer.check.path)))
    except ScoringError as error:
        raise SettingsError(f"{field}: {error}") from None
    read = [Path(settings[name]) for name in ("folder", "weights_folder") if settings[name]]
    check_host(scorer.launcher, scorer.slurm, scorer.k8s, field, read)
    checked = f", checked on {pairs} pairs" if pairs else ", not checked before it is trusted"
    return f"{found}, {settings['weights_folder'] or settings['folder']}{checked}"


# Pure functions


def _by_function(scorer: TextScorer, samples: pl.DataFrame, report: Report) -> pl.DataFrame:
    texts = samples["text"].to_list()
    scores: list[float | None] = []
    for part in _function_scores(scorer, texts):
        scores += part
        report(len(scores), len(texts))
    return _rows(scorer, samples, [(score, None, "skipped") for score in scores], "nothing to score")


def _function_scores(scorer: TextScorer, texts: Sequence[str]) -> Iterator[list[float | None]]:
    chunks = list(_chunks(texts))
    workers = min(processors(), len(chunks))
    if sum(map(len, texts)) < PARALLEL_FROM or workers < 2:
        yield from (scorer.score(chunk) for chunk in chunks)
        return
    # spawn: a fork would copy the locks of Dagster's threads.
    spawn = multiprocessing.get_context("spawn")
    settings = json.dumps(scorer.model_dump(mode="json"))
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(_score_chunk, [type(scorer)] * len(chunks), [settings] * len(chunks), chunks)


def _score_chunk(kind: type[TextScorer], settings: str, texts: Sequence[str]) -> list[float | None]:
    return kind.model_validate_json(settings).score(texts)


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# Models


def _by_model(
    scorer: ModelScorer, samples: pl.DataFrame, report: Report, facts: dict[str, Any]
) -> pl.DataFrame:
    settings, trusted = _settings_of(scorer)
    shows_prompt = not (isinstance(scorer, ClassifierScorer) and scorer.reads == "text")
    prompts = samples["prompt"].to_list() if shows_prompt else [""] * samples.height
    pairs = list(zip(prompts, samples["text"].to_list(), strict=True))
    asked = list(dict.fromkeys(pairs if shows_prompt else (p for p in pairs if p[1].strip())))
    with _worker(scorer, settings, trusted) as channel:
        if scorer.check is not None:
            facts["check_accuracy"] = _check(scorer, channel, shows_prompt)
        found = channel.call({"pairs": asked, "total": len(asked)}, report) if asked else []
    known = dict(zip(asked, found, strict=True))
    nothing = (None, "nothing to score: the text is blank")
    outcomes = []
    for pair in pairs:
        score, reason = known.get(pair, nothing)
        blank = reason is not None and reason.startswith("nothing to score")
        outcomes.append((score, reason, "skipped" if blank else "failed"))
    return _rows(scorer, samples, outcomes, "")


_idle: tuple[object, Channel] | None = None  # the last worker, and what it has read


@contextmanager
def _worker(scorer: ModelScorer, settings: dict[str, Any], trusted: bool) -> Iterator[Channel]:
    """A worker with the model; one on this machine's CPU stays for the next call, as starting takes seconds."""
    global _idle
    host = host_of(scorer.launcher, scorer.slurm, scorer.ray, scorer.k8s)
    folders = [settings[name] for name in ("folder", "weights_folder") if settings[name] is not None]
    read = (settings, trusted, [version_of(Path(folder)) for folder in folders])
    kept, _idle = _idle, None
    if kept is not None and host is None and kept[0] == read:
        channel = kept[1]
    else:
        if kept is not None:
            kept[1].close()
        channel = Channel(
            "resources.rewards.worker",
            settings,
            error=ScoringError,
            what="scoring worker",
            offline=not trusted,
            host=host,
        )
    try:
        yield channel
    except BaseException:
        channel.close()
        raise
    if host is None and channel.ready is not None and channel.ready["device"] == "cpu":
        _idle = (read, channel)
    else:  # others need the GPU, or the node
        channel.close()


def _settings_of(scorer: ModelScorer) -> tuple[dict[str, Any], bool]:
    """The worker's settings, and whether it may run code of the model."""
    try:
        folder = find_folder(scorer.model, scorer.revision, "model")
        weights: Path | None = None
        if isinstance(scorer, RewardModelScorer) and scorer.head == "gptj_last_token":
            weights = folder
            if scorer.weights is not None:
                weights = find_folder(scorer.weights, scorer.weights_revision, "weights", unsafe=True)
            else:
                folder = weights = find_folder(scorer.model, scorer.revision, "model", unsafe=True)
    except SettingsError as error:
        raise ScoringError(f"scorer {scorer.name}: {error}") from None
    plain = scorer.model_dump(mode="json")
    return {
        **{name: plain[name] for name in ("dtype", "device", "keep", "allow_truncated_text", "max_length")},
        **{name: plain[name] for name in ("batch_tokens", "trust_remote_code")},
        "head": plain.get("head", "sequence_classification"),
        "label": plain.get("label"),
        "activation": plain.get("activation", "none"),
        "template": scorer.shown_template,
        "cue": scorer.shown_cue,
        "folder": str(folder),
        "weights_folder": None if weights is None else str(weights),
    }, scorer.trust_remote_code


def _check(scorer: ModelScorer, channel: Channel, shows_prompt: bool) -> float:
    """The share of known pairs that the model tells apart; raises where that is too little."""
    assert scorer.check is not None
    rows = read_pairs(Path(scorer.check.path))
    texts = [((prompt if shows_prompt else ""), text) for prompt, *both in rows for text in both]
    scores = [score for score, _ in channel.call({"pairs": texts, "total": len(texts)})]
    right = 0
    for chosen, rejected in zip(scores[::2], scores[1::2], strict=True):
        right += chosen is not None and rejected is not None and scorer.value(chosen) > scorer.value(rejected)
    accuracy = right / len(rows)
    if accuracy < scorer.check.min_accuracy:
        raise ScoringError(
            f"scorer {scorer.name}: {scorer.model} prefers the chosen text in {right} of {len(rows)} pairs of "
            f"{scorer.check.path} ({accuracy:.2f}; check.min_accuracy is {scorer.check.min_accuracy}), so its scores "
            "are not trusted; its weights, template, label or direction may be wrong"
        )
    return accuracy


def read_pairs(path: Path) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of every line of a JSON Lines file.

    Raises:
        ScoringError: no such file, or a line that is none of that.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ScoringError(f"check.path: {path} cannot be read ({error}); give a file of pairs") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = tuple(record[name] for name in ("prompt", "chosen", "rejected"))
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = ()
        if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
            raise ScoringError(
                f"check.path: {path}:{number}: no object with the texts prompt, chosen and rejected; mend the line"
            )
        rows.append((texts[0], texts[1], texts[2]))
    if not rows:
        raise ScoringError(f"check.path: {path} holds no pair; add some, or leave `check` out")
    return rows


# Files


def _from_file(
    scorer: ImportedScorer, samples: pl.DataFrame, iteration: int | None, facts: dict[str, Any]
) -> pl.DataFrame:
    try:
        path = scorer.file(iteration)
    except ValueError as error:
        raise ScoringError(f"scorer imported: path: {error}") from None
    if not path.is_file():
        raise ScoringError(_how_to_annotate(path, iteration, scorer.format))
    options = {
        name: getattr(scorer, name) for name in ("labels", "scores") if getattr(scorer, name) is not None
    }
    try:
        found = read_feedback(path, scorer.format, **options)
    except SettingsError as error:
        raise ScoringError(f"scorer imported: {error}") from None
    if found.refused and not scorer.skip_refused:
        raise ScoringError(
            f"scorer imported: {path}: {len(found.refused)} of {found.rows} rows cannot be read; mend them, or set "
            f"skip_refused\n{found.summary()}"
        )
    judgements = _one_aspect(scorer, path, found)
    rows = match_judgements(samples, found.samples, judgements, scorer.kind)
    matched = sum(row["reason"] != "no judgement in the file" for row in rows)
    if not matched:
        raise ScoringError(
            f"scorer imported: {path} judges none of the {len(rows)} samples (by sample_id, or prompt and text); is "
            "it the file of another iteration or seed?"
        )
    facts |= {"judgements": judgements.height, "matched": matched}
    frame = pl.DataFrame(
        rows, {name: SCORED[name] for name in ("value", "label", "text", "status", "reason")}
    )
    return _ordered(frame.with_columns(sample_id=samples["sample_id"], score="value"))


def _one_aspect(scorer: ImportedScorer, path: Path, found: Imported) -> pl.DataFrame:
    if scorer.aspect is not None and found.feedback.is_empty():
        raise ScoringError(f"scorer imported: {path} has no aspect {scorer.aspect!r}; it has: none")
    if found.feedback.is_empty():
        raise ScoringError(f"scorer imported: {path} holds no judgement of a single response")
    try:
        return of_aspect(found.feedback, scorer.aspect, path)
    except ValueError as error:
        raise ScoringError(f"scorer imported: {error}") from None


def _how_to_annotate(path: Path, iteration: int | None, format_name: str) -> str:
    k = "K" if iteration is None else str(iteration)
    return (
        f"scorer imported: {path} is not there yet. Write the samples with `textalign export EXPERIMENT "
        f"samples.jsonl -k {k}`, have them judged (a row each: sample_id, prompt, response, and value, label or "
        f"feedback), save that as {path} in the format {format_name}, and run the experiment again: it continues from here."
    )


# Rows


def _rows(
    scorer: Scorer,
    samples: pl.DataFrame,
    outcomes: Sequence[tuple[float | None, str | None, str]],
    reason: str,
) -> pl.DataFrame:
    """(score, why not, status if not) of each sample as rows."""
    rows = []
    for score, why, status in outcomes:
        good = score is not None and math.isfinite(score)
        rows.append(
            {
                "score": score if good else None,
                "value": scorer.value(score) if good and score is not None else None,
                "status": "ok" if good else status if score is None else "failed",
                "reason": None if good else why or reason if score is None else f"the score is {score}",
            }
        )
    none = pl.lit(None, dtype=pl.String)
    frame = pl.DataFrame(rows, {name: SCORED[name] for name in ("score", "value", "status", "reason")})
    return _ordered(frame.with_columns(sample_id=samples["sample_id"], text=none, label=none))


def _ordered(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(kind) for name, kind in SCORED.items())
