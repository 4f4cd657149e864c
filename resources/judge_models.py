"""Judgments that a language model of one's own writes, in the engine that samples the policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl

from resources.engines.sampler import Completion, Decoding, Request, Sampler
from resources.rewards.folder import find_folder
from resources.rewards.trained import located
from resources.store import ArtifactStore
from textalign_dagster.judging.answers import FLAWED, PERFECT
from textalign_dagster.judging.critique import read_judgment
from textalign_dagster.judging.extract import Unreadable
from textalign_dagster.judging.verdict import Verdict, skipped, unparseable
from textalign_dagster.scorers import JudgeModel
from textalign_dagster.settings import SettingsError
from textalign_dagster.tokenisation import token_counts


def written_judgments(
    scorer: JudgeModel,
    samples: pl.DataFrame,
    engine: Sampler,
    report: Callable[..., None],
    *,
    trust_remote_code: bool = False,
) -> pl.DataFrame:
    """The model's judgment of each sample, decoded greedily: sample_id, label, text, status, reason.

    Samples that are alike are read once. One that does not fit the model's context is ``skipped``; a judgment that
    is cut off, empty, or praise in more than the one word is ``unparseable``.

    Args:
        scorer: its ``model`` is a folder or a hub id.
        samples: sample_id, prompt, text.
        trust_remote_code: as for the engine.

    Raises:
        SettingsError: there is no such model, or it is not a language model.
    """
    folder = _language_model(scorer)
    shown = (samples["prompt"] + samples["text"] + scorer.question).to_list()
    asked = list(dict.fromkeys(shown))
    room = _context(folder, trust_remote_code)
    if room is not None:
        counts = token_counts(folder, asked, trust_remote_code=trust_remote_code)
        asked = [
            text
            for text, count in zip(asked, counts, strict=True)
            if count + 1 + scorer.max_new_tokens <= room
        ]
    decoding = Decoding(temperature=0.0, max_new_tokens=scorer.max_new_tokens)
    found = (
        engine.generate(folder, [Request(text, (0,)) for text in asked], decoding, report) if asked else []
    )
    verdicts = {text: _read(written) for text, (written,) in zip(asked, found, strict=True)}
    too_long = skipped(
        f"with {scorer.max_new_tokens} tokens of a judgment it exceeds the {room} of the judge"
    )
    rows = [
        (sample_id, verdict.label, verdict.text, verdict.status, verdict.reason)
        for sample_id, text in zip(samples["sample_id"], shown, strict=True)
        for verdict in (verdicts.get(text, too_long),)
    ]
    columns = ("sample_id", "label", "text", "status", "reason")
    return pl.DataFrame(rows, dict.fromkeys(columns, pl.String), orient="row")


def check_judge_model(scorer: JudgeModel, store: ArtifactStore) -> None:
    """Whether the model is there, can write, and is asked as it was trained.

    Raises:
        SettingsError: it is not; names the field and the remedy.
        ArtifactError: the experiment that it names has trained none.
    """
    found = located(scorer, store)
    assert isinstance(found, JudgeModel)
    _language_model(found)
    pointer = None if scorer.trained is None else store.pointer(*scorer.trained, "datapool")
    if pointer is None:
        return
    method = pointer.settings["method"]
    if "question" not in method:
        raise SettingsError(
            f"scorer.model: {scorer.model} was not trained to judge (method {method['name']}); name an experiment with "
            "method forward_prediction"
        )
    if method["question"] != scorer.question:
        raise SettingsError(
            f"scorer.question: {scorer.question!r}, but {scorer.model} was trained with {method['question']!r}; set it "
            "to that"
        )


def _language_model(scorer: JudgeModel) -> Path:
    folder = find_folder(scorer.model, scorer.revision, "scorer.model")
    try:
        kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError) as error:
        raise SettingsError(f"scorer.model: {folder}: config.json cannot be read ({error})") from None
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise SettingsError(
            f"scorer.model: {folder} is a {kinds[0]}, which writes nothing; give a language model, or an experiment "
            "with method forward_prediction"
        )
    return folder


def _read(written: Completion) -> Verdict:
    if written.finish_reason == "length":
        return unparseable(f"cut off after {written.n_tokens} tokens")
    try:
        critique = read_judgment(written.text)
    except Unreadable as problem:
        return unparseable(str(problem))
    return Verdict("ok", label=PERFECT if critique is None else FLAWED, text=critique)


def _context(folder: Path, trust_remote_code: bool) -> int | None:
    from transformers import AutoConfig  # takes seconds

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
