"""Scorers that are models: a worker process loads them, and scores pairs of prompt and text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from resources.rewards.folder import find_folder
from resources.rewards.rows import Report, ScoringError, scored_rows
from resources.workers.channel import Channel
from resources.workers.host import host_of
from resources.workers.serving import version_of
from textalign_dagster.scorers import ClassifierScorer, ModelScorer, RewardModelScorer
from textalign_dagster.settings import SettingsError


def by_model(
    scorer: ModelScorer, samples: pl.DataFrame, report: Report, facts: dict[str, Any]
) -> pl.DataFrame:
    settings = worker_settings(scorer)
    shows_prompt = not (isinstance(scorer, ClassifierScorer) and scorer.reads == "text")
    prompts = samples["prompt"].to_list() if shows_prompt else [""] * samples.height
    pairs = list(zip(prompts, samples["text"].to_list(), strict=True))
    distinct = list(dict.fromkeys(pairs if shows_prompt else (p for p in pairs if p[1].strip())))
    with _worker(scorer, settings) as channel:
        if scorer.check is not None:
            facts["check_accuracy"] = _check(scorer, channel, shows_prompt)
        found = channel.call({"pairs": distinct, "total": len(distinct)}, report) if distinct else []
    known = dict(zip(distinct, found, strict=True))
    nothing = (None, "nothing to score: the text is blank")
    outcomes = []
    for pair in pairs:
        score, reason = known.get(pair, nothing)
        blank = reason is not None and reason.startswith("nothing to score")
        outcomes.append((score, reason, "skipped" if blank else "failed"))
    return scored_rows(scorer, samples, outcomes, "")


_idle: tuple[object, Channel] | None = None  # the last worker, and what it has loaded


@contextmanager
def _worker(scorer: ModelScorer, settings: dict[str, Any]) -> Iterator[Channel]:
    """A worker with the model; one on this machine's CPU is kept for the next call, as starting takes seconds."""
    global _idle
    host = host_of(scorer.launcher, scorer.slurm, scorer.ray, scorer.k8s)
    folders = [settings[name] for name in ("folder", "weights_folder") if settings[name] is not None]
    read = (settings, [version_of(Path(folder)) for folder in folders])
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
            offline=not scorer.trust_remote_code,
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


def worker_settings(scorer: ModelScorer) -> dict[str, Any]:
    try:
        folder = find_folder(scorer.model, scorer.revision, "model")
        weights: Path | None = None
        if isinstance(scorer, RewardModelScorer) and scorer.head == "gptj_last_token":
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
    }


def _check(scorer: ModelScorer, channel: Channel, shows_prompt: bool) -> float:
    """The share of known pairs that the model ranks correctly; raises `ScoringError` if it is too low."""
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
        ScoringError: the file cannot be read, or a line is not such a pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ScoringError(
            f"check.path: {path} cannot be read ({error}); set it to a file of pairs"
        ) from None
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
                f"check.path: {path}:{number}: no object with the texts prompt, chosen and rejected; fix the line"
            )
        rows.append((texts[0], texts[1], texts[2]))
    if not rows:
        raise ScoringError(f"check.path: {path} holds no pair; add some, or leave `check` out")
    return rows
