"""Offline experiments: prompts, responses and judgements come from a file, in place of the policy's samples.

A file's response becomes a sample once for every time its prompt is drawn, so that everything downstream
of the samples is the same as for those of a policy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.experiment import corpus
from textalign_dagster.experiment.experiment import Experiment
from textalign_dagster.feedback_files.formats import read_feedback
from textalign_dagster.feedback_files.imported import Imported, of_aspect
from textalign_dagster.ids import content_hash
from textalign_dagster.judging.asking import Judged
from textalign_dagster.judging.pairs import PAIRS, oriented, ranking_feedback
from textalign_dagster.methods import FeedbackKind
from textalign_dagster.prompts import COLUMNS, following, held_out, prompt_id
from textalign_dagster.scorers.file_stamps import file_hash
from textalign_dagster.scorers.matching import nothing, taken
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.offline import Offline
from textalign_dagster.tables import FEEDBACK
from textalign_dagster.tasks import Task

OFFLINE_VERSION = "1"
"""Incremented with every change in how files become samples and feedback."""


def identity(offline: Offline) -> dict[str, Any]:
    """What the samples and the feedback depend on: the file's content, and how it is read."""
    return {**offline.reading, "content": file_hash(Path(offline.path)), "reader": OFFLINE_VERSION}


def offline_prompts(experiment: Experiment, task: Task) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The prompts of the file that iterations draw from, and those held out.

    Returns:
        Two frames with columns prompt, reference, source, source_revision. The reference is the file's own, or the
        response that is judged best.

    Raises:
        SettingsError: the file cannot be used; the message says why.
    """
    offline = _offline(experiment)
    if experiment.corpus is not None:
        found = corpus.shards(offline)
        return found, found.clear()
    return _prompts(offline, task, file_hash(Path(offline.path)))


def offline_samples(experiment: Experiment, task: Task, draws: pl.DataFrame) -> pl.DataFrame:
    """The responses to the drawn prompts.

    Args:
        draws: draw_id, prompt_id, prompt; in the order of the draw.

    Returns:
        draw_id, own_id (of the response in the file), sample_id, prompt_id, prompt, text, sample_index.
    """
    if experiment.corpus is not None:
        return corpus.documents(experiment.corpus, draws)
    samples = _responses(experiment, task).samples.select("prompt_id", "text", own_id="sample_id")
    rows = draws.select("draw_id", "prompt_id", "prompt").join(
        samples, on="prompt_id", maintain_order="left_right"
    )
    ids = [content_hash("offline sample", *both) for both in rows.select("draw_id", "own_id").iter_rows()]
    return rows.with_columns(
        pl.Series("sample_id", ids, dtype=pl.String), sample_index=pl.int_range(pl.len()).over("draw_id")
    )


def offline_feedback(experiment: Experiment, task: Task, draws: pl.DataFrame, kind: FeedbackKind) -> Judged:
    """The file's feedback on the responses to the drawn prompts; for comparisons, each response's share of points.

    Args:
        draws: as for :func:`offline_samples`.

    Returns:
        One row of FEEDBACK per sample, in their order; and the comparisons, if there are any.

    Raises:
        SettingsError: the file has several aspects, and the experiment names none.
    """
    found, samples = _responses(experiment, task), offline_samples(experiment, task, draws)
    judged = {row["sample_id"]: row for row in _one_aspect(experiment, found.feedback).iter_rows(named=True)}
    ids = samples.select("draw_id", "own_id", "sample_id")
    pairs = oriented(
        _one_aspect(experiment, found.pairs)
        .rename({"sample_a": "own_a", "sample_b": "own_b"})
        .join(ids.rename({"own_id": "own_a", "sample_id": "sample_a"}), on="own_a")
        .join(ids.rename({"own_id": "own_b", "sample_id": "sample_b"}), on=["own_b", "draw_id"])
        .sort("sample_a", "sample_b")
        .select(*PAIRS)
    )
    provenance = {
        "aspect": "offline",
        "scorer": f"imported from {Path(_offline(experiment).path).name}",
        "scorer_version": content_hash(identity(_offline(experiment)))[:8],
        "parser_version": None,
    }
    points = {row["sample_id"]: row for row in ranking_feedback(pairs, {}, provenance).iter_rows(named=True)}
    rows = []
    for own_id, sample_id in samples.select("own_id", "sample_id").iter_rows():
        # A judgment in words is not a reward; a comparison with the response that amends it is.
        found_of = [row for row in (judged.get(own_id), points.get(sample_id)) if row is not None]
        verdicts = [taken(row, kind) for row in found_of] or [nothing("skipped", "no judgement in the file")]
        verdict = next((one for one in verdicts if one["status"] == "ok"), verdicts[0])
        rows.append({"sample_id": sample_id, "kind": kind, "call_keys": [], **provenance, **verdict})
    return Judged(pl.DataFrame(rows, FEEDBACK), pairs=pairs if pairs.height else None)


def held_out_responses(experiment: Experiment, task: Task) -> pl.DataFrame:
    """The responses to the held-out prompts with the file's feedback: prompt_id, sample_id, value, ….

    Returns:
        Also prompt, reference, text and finish_reason.
    """
    _, prompts = offline_prompts(experiment, task)
    found = _responses(experiment, task)
    return (
        found.samples.drop("reference")
        .join(prompts.select("prompt", "reference"), on="prompt", maintain_order="left")
        .join(_worth(found), on="sample_id", how="left", maintain_order="left")
        .with_columns(finish_reason=pl.lit("stop"))
    )


def summary(experiment: Experiment, task: Task) -> str:
    """A summary of what the file holds and of what was left out.

    Raises:
        SettingsError: the file holds nothing that the method can be trained on.
    """
    if (offline := experiment.corpus) is not None:
        count = corpus.shards(offline).height
        scored = "scored in the file" if corpus.scored_elsewhere(offline) else "to be scored"
        return f"{count:,} shards of up to {offline.shard:,} documents, each {offline.segments} {scored}"
    found, wanted = _responses(experiment, task), experiment.method.wants
    if experiment.judged_by_file and wanted is not None:
        prompts = found.samples.select("prompt_id", "prompt").unique(maintain_order=True)
        rows = offline_feedback(experiment, task, prompts.with_columns(draw_id="prompt_id"), wanted).rows
        if rows.filter(status="ok").is_empty():
            raise SettingsError(
                f"offline.path: {_offline(experiment).path} has no judgement of the kind that method "
                f"{experiment.method.name} needs, {wanted} ({rows['reason'][0]}); set a judge or scorer, or train with "
                "no_feedback"
            )
    return found.summary()


def _offline(experiment: Experiment) -> Offline:
    assert experiment.offline is not None, "not an offline experiment"
    return experiment.offline


def _worth(found: Imported) -> pl.DataFrame:
    """The responses that are judged: sample_id, value."""
    provenance = {name: "" for name in ("aspect", "scorer", "scorer_version", "parser_version")}
    frames = [found.feedback, ranking_feedback(found.pairs, {}, provenance)]
    return pl.concat(frame.filter(status="ok").select("sample_id", "value") for frame in frames).unique(
        "sample_id", keep="first", maintain_order=True
    )


def _one_aspect(experiment: Experiment, rows: pl.DataFrame) -> pl.DataFrame:
    offline = _offline(experiment)
    try:
        return of_aspect(rows, offline.aspect, offline.path)
    except ValueError as error:
        raise SettingsError(f"offline.aspect: {error}") from None


def _responses(experiment: Experiment, task: Task) -> Imported:
    offline = _offline(experiment)
    return _read(offline, task, file_hash(Path(offline.path)))


@lru_cache(maxsize=8)
def _read(offline: Offline, task: Task, content: str | None) -> Imported:
    """The file with that content hash, with the prompts as the task reads them."""
    if content is None:
        raise SettingsError(f"offline.path: {offline.path}: no such file")
    try:
        found = read_feedback(Path(offline.path), offline.format)
    except SettingsError as error:
        raise SettingsError(f"offline.path: {error}") from None
    if found.refused and not offline.skip_refused:
        raise SettingsError(
            f"offline.path: {offline.path}: {len(found.refused)} of {found.rows} rows cannot be read; fix them, or set "
            f"offline.skip_refused\n{found.summary()}"
        )
    if offline.refinements:
        found = _with_refinements(found, offline.path)
    cleaned: dict[str, str] = {}
    refused: dict[str, str] = {}
    for prompt in found.samples["prompt"].unique(maintain_order=True):
        try:
            cleaned[prompt] = task.cleaned(prompt)
        except ValueError as error:
            refused[prompt] = str(error)
    if not cleaned or (refused and not offline.skip_refused):
        example = next(iter(refused.items()), ("", "the file holds no response"))
        raise SettingsError(
            f"offline.path: {offline.path}: task {task.name} cannot use {len(refused)} of its prompts, e.g. "
            f"{example[0]!r:.80}: {example[1]}; fix them, or set offline.skip_refused"
        )
    samples = found.samples.filter(pl.col("prompt").is_in(list(cleaned))).with_columns(
        prompt=pl.col("prompt").replace_strict(cleaned, return_dtype=pl.String)
    )
    ids = pl.Series("prompt_id", [prompt_id(prompt) for prompt in samples["prompt"]], dtype=pl.String)
    samples = samples.with_columns(ids, text=following("text"))
    kept = set(samples["sample_id"])
    return Imported(
        samples,
        found.feedback.filter(pl.col("sample_id").is_in(kept)),
        found.pairs.filter(pl.col("sample_a").is_in(kept) & pl.col("sample_b").is_in(kept)),
        found.rows,
        found.refused,
        found.notes,
    )


def _with_refinements(found: Imported, path: str) -> Imported:
    """Adds the references as samples, each preferred to the sample that it amends.

    A reference that already is a response to its prompt is not added again.

    Raises:
        SettingsError: there are no such references.
    """
    amended = found.samples.filter(
        pl.col("reference").is_not_null()
        & (pl.col("reference").str.strip_chars() != pl.col("text").str.strip_chars())
    )
    if amended.is_empty():
        raise SettingsError(f"offline.refinements: {path} has no amended response (`i_ans`); remove it")
    known = {
        (prompt, text.strip()): sample_id
        for sample_id, prompt, text in found.samples.select("sample_id", "prompt", "text").iter_rows()
    }
    ids = [
        known.get((prompt, reference.strip()), content_hash("refinement", sample_id))
        for sample_id, prompt, reference in amended.select("sample_id", "prompt", "reference").iter_rows()
    ]
    refined = amended.with_columns(pl.Series("own", ids, dtype=pl.String))
    provenance = found.feedback.select("aspect", "scorer", "scorer_version", "parser_version").head(1)
    pairs = refined.select("prompt_id", sample_a="own", sample_b="sample_id").join(provenance, how="cross")
    pairs = pairs.with_columns(
        winner=pl.lit("a"),
        favoured=pl.lit(None, dtype=pl.String),
        status=pl.lit("ok"),
        reason=pl.lit(None, dtype=pl.String),
        call_keys=pl.lit([], dtype=pl.List(pl.String)),
    ).select(*PAIRS)
    added = refined.filter(~pl.col("own").is_in(list(known.values()))).unique("own", maintain_order=True)
    samples = added.with_columns(sample_id="own", text="reference").select(found.samples.columns)
    return replace(
        found,
        samples=pl.concat([found.samples, samples]),
        pairs=pl.concat([found.pairs, oriented(pairs).unique(["sample_a", "sample_b"], maintain_order=True)]),
    )


@lru_cache(maxsize=8)
def _prompts(offline: Offline, task: Task, content: str | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The prompts of the file with that content hash; cached, because the grid's states read them often."""
    found = _read(offline, task, content)
    worth = _worth(found)
    best = (
        found.samples.join(worth, on="sample_id", how="left", maintain_order="left")
        .with_columns(
            best=pl.col("text").sort_by("value", nulls_last=True, descending=True).first().over("prompt")
        )
        .with_columns(best=pl.when(pl.col("value").is_not_null().any().over("prompt")).then("best"))
    )
    prompts = best.group_by("prompt", maintain_order=True).agg(
        reference=pl.coalesce(pl.col("reference").drop_nulls().first(), pl.col("best").first())
    )
    prompts = prompts.with_columns(
        source=pl.lit(Path(offline.path).name),
        source_revision=pl.lit(content_hash("prompts", prompts["prompt"].to_list())),
    ).select(COLUMNS)
    count = offline.held_out or 0
    if count >= prompts.height:
        raise SettingsError(
            f"offline.held_out: {count}, but {offline.path} has {prompts.height} prompts, and some must "
            "remain; lower it"
        )
    chosen = pl.col("prompt").is_in(list(held_out(prompts["prompt"], count)))
    return prompts.filter(~chosen), prompts.filter(chosen)
