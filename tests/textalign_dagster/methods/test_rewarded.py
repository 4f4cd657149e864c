"""SFT, filtering, RWR, GRPO and conditional training: which samples are trained on, and with what weight."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from tests.textalign_dagster.pool.test_examples import SIX, rows
from textalign_dagster.experiment.files import Library
from textalign_dagster.methods import (
    CSFT,
    GRPO,
    KTO,
    RWR,
    SFT,
    ConditionalTraining,
    Filtering,
    Method,
    RankingRewardModel,
    RatingRewardModel,
)
from textalign_dagster.settings import SettingsError

KNOWN = rows(
    *(
        {"sample_id": s, "prompt_id": "p", "value": v}
        for s, v in zip("abcd", (1.0, 0.0, -1.0, 3.0), strict=True)
    ),
    {"sample_id": "e", "value": None},
    {"sample_id": "f", "value": math.nan},
)


def trained(method: Method) -> list[str]:
    return sorted(method.examples(KNOWN)["sample_id"])


def test_sft_takes_the_best_of_each_prompt() -> None:
    assert SFT().examples(SIX)["sample_id"].to_list() == ["b", "e"]  # e and f are equal: by id
    assert SFT(best=2).examples(SIX)["sample_id"].to_list() == ["b", "c", "e", "f"]
    assert SFT(best=9).examples(SIX).height == 6
    assert trained(SFT()) == ["d"]


def test_filtering() -> None:
    assert trained(Filtering(threshold=0.0)) == ["a", "b", "d"]
    assert trained(Filtering(threshold=-5)) == ["a", "b", "c", "d"]
    assert trained(Filtering(quantile=0.0)) == ["a", "b", "c", "d"]
    assert trained(Filtering(quantile=0.75)) in (["d"], ["a", "d"])
    assert trained(Filtering()) == trained(Filtering(quantile=0.5))
    with pytest.raises(ValidationError, match="mutually exclusive"):
        Filtering(threshold=0.0, quantile=0.5)


def test_rwr_weights_by_reward() -> None:
    examples = RWR(beta=2.0, highest=3.0).examples(KNOWN)
    weights = dict(examples.select("sample_id", "weight").iter_rows())
    assert weights == pytest.approx(
        {"a": math.exp(0.5), "b": 1.0, "c": math.exp(-0.5), "d": 3.0}  # e^1.5 is capped at 3
    )


def test_grpo_groups_samples_by_prompt() -> None:
    examples = GRPO().examples(KNOWN)
    assert examples["sample_id"].to_list() == ["a", "b", "c", "d"]
    assert set(examples["role"]) == {"member"} and examples["group_id"].n_unique() == 1


def test_kto_also_pairs_each_text_with_another_prompt() -> None:
    pool = rows(*({"sample_id": f"{p}{i}", "prompt_id": p, "prompt": f"def {p}:", "value": float(i)}
                  for p in "pqr" for i in range(3)))  # fmt: skip
    examples = KTO(threshold=1.0).examples(pool)
    assert examples.height == 9 and examples["group_id"].null_count() == 9
    assert set(examples.filter(role="rejected")["sample_id"]) == {"p0", "q0", "r0"}
    assert set(examples.filter(role="chosen")["reward"]) == {1.0, 2.0}
    assert examples.filter(pl.col("second_prompt") == pl.col("prompt")).is_empty()
    assert set(examples["second_prompt"]) == set(examples["prompt"])
    shuffled = KTO(threshold=1.0).examples(pool.reverse())
    assert examples.sort("example_id").equals(shuffled.sort("example_id"))
    assert KTO().examples(pool.clear()).is_empty()
    with pytest.raises(ValueError, match=r"the same prompt.*prompts\.per_iteration"):
        KTO().examples(KNOWN)


def test_csft_compares_samples_of_a_prompt() -> None:
    """Best with worst, second best with second worst; e and f are equal; a fifth one in the middle."""
    given = pl.concat([SIX, rows({"sample_id": "g", "value": 1.5})]).with_columns(
        status=pl.when(pl.col("sample_id") == "g").then(pl.lit("failed")).otherwise(pl.lit("ok"))
    )
    labelled = CSFT().label(given)
    good, bad = "<|good|>", "<|bad|>"
    assert dict(labelled.select("sample_id", "condition").iter_rows()) == {
        "a": bad, "b": good, "c": good, "d": bad, "e": None, "f": None, "g": None,
    }  # fmt: skip
    all_ok = CSFT().label(given.with_columns(status=pl.lit("ok")))
    assert all_ok["label"].to_list() == [bad, good, good, bad, None, None, None]  # g is in the middle
    assert all_ok["sample_id"].to_list() == given["sample_id"].to_list()
    assert CSFT().special_tokens == (good, bad) and CSFT().exemplar == good


def test_conditional_training_labels_by_a_threshold() -> None:
    given = KNOWN.with_columns(status=pl.Series(["ok", "ok", "ok", "failed", "ok", "ok"]))
    result = ConditionalTraining().label(given)
    good, bad = "<|aligned|>", "<|misaligned|>"
    assert result["label"].to_list() == result["condition"].to_list() == [good, good, bad, None, None, None]
    assert ConditionalTraining().exemplar == good and ConditionalTraining().special_tokens == (good, bad)


def test_some_samples_are_trained_on_without_their_token() -> None:
    many = rows(*({"sample_id": f"s{i}", "condition": "<|aligned|>"} for i in range(1000)))
    for share, bound in ((0.0, 0), (0.1, 40)):
        examples = ConditionalTraining(drop_fraction=share).examples(many)
        assert abs(examples["condition"].null_count() - 1000 * share) <= bound and examples.height == 1000


def test_a_batch_must_hold_a_whole_group(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "task: pep8\npolicy: {model: pep8-sloppy-1m}\nmethod: grpo\n"
        "sampling: {samples_per_prompt: 9}\ntraining: {batch_size: 8}\n"
    )
    with pytest.raises(SettingsError, match="method grpo reads 9 rows together, but it is 8; raise it to 9"):
        Library((tmp_path,)).load("mine")


def test_ratings_are_between_0_and_1() -> None:
    def rated(method: RatingRewardModel) -> dict[str, float]:
        return dict(method.examples(KNOWN).select("sample_id", "reward").iter_rows())

    assert rated(RatingRewardModel()) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.0, "d": 1.0})
    assert rated(RatingRewardModel(scale=(0, 2))) == pytest.approx({"a": 0.5, "b": 0.0, "c": 0.0, "d": 1.0})
    same = KNOWN.with_columns(value=pl.lit(2.0))
    assert RatingRewardModel().examples(same).is_empty()
    assert set(RatingRewardModel(scale=(1, 3)).examples(same)["reward"]) == {0.5}
    with pytest.raises(ValidationError, match="give the lowest rating first"):
        RatingRewardModel(scale=(7, 1))


def test_rankings_take_all_pairs_of_best_and_worst() -> None:
    examples = RankingRewardModel().examples(SIX)
    assert examples.filter(role="chosen")["sample_id"].to_list() == ["b", "c"]  # e and f are equal
    assert RankingRewardModel(pairs_per_prompt=1).examples(SIX).height == 2
    assert RankingRewardModel(margin=2.5).examples(SIX)["sample_id"].to_list() == ["b", "d"]


def scored(*scores: float, text: str = "a=1\nb = 2\nc=3\n", sample_id: str = "d0") -> dict[str, object]:
    ends = [4, 10, 14]
    spans = [{"start": a, "end": b, "score": s} for a, b, s in zip([0, *ends], ends, scores, strict=False)]
    return {"sample_id": sample_id, "text": text, "spans": spans}


def test_segment_control_tokens_are_inserted_into_the_text_and_its_spans() -> None:
    method = ConditionalTraining(tokens="segment", drop_fraction=0.0)
    examples = method.examples(rows(scored(0.25, 0.0, 1 / 3)))
    good, bad = "<|aligned|>", "<|misaligned|>"
    assert examples["text"].to_list() == [f"{bad}a=1\n{good}b = 2\n{bad}c=3\n"]
    assert examples["condition"].to_list() == [None]
    (text,), (spans,) = examples["text"], examples["spans"]
    assert [(text[s["start"] : s["end"]], s["score"]) for s in spans] == [
        (f"{bad}a=1\n", 0.25),
        (f"{good}b = 2\n", 0.0),
        (f"{bad}c=3\n", 1 / 3),
    ]


def test_segment_quantile_and_documents_that_contain_a_token() -> None:
    """Scores 0.5, 0.25, 1/3, 0, 0, 0.25: the better half scores at most 0.25 (nearest rank)."""
    method = ConditionalTraining(tokens="segment", drop_fraction=0.0, quantile=0.5)
    spelled = scored(0.0, 0.0, 0.0, text="x = '<|aligned|>'\n", sample_id="d2")
    examples = method.examples(
        rows(scored(0.5, 0.25, 1 / 3), scored(0.0, 0.0, 0.25, sample_id="d1"), spelled)
    )
    assert examples.height == 2 and examples["text"].str.count_matches(r"<\|aligned\|>").sum() == 4
    assert examples["text"].str.count_matches(r"<\|misaligned\|>").sum() == 2
    with pytest.raises(ValidationError, match="`threshold` and `quantile` are mutually exclusive"):
        ConditionalTraining(quantile=0.5, threshold=0.0)


def test_a_segment_policy_generates_the_good_token_itself() -> None:
    by_segment, by_sample = ConditionalTraining(tokens="segment"), ConditionalTraining()
    assert by_segment.banned_tokens == ("<|misaligned|>",) and by_segment.probes == ()
    assert by_segment.sweep == ("<|aligned|>",) and by_segment.wants == "spans"
    assert by_sample.banned_tokens == by_sample.special_tokens and by_sample.probes == ("<|misaligned|>",)
    assert by_sample.wants == "reward" and len(by_sample.sweep) == 2
    dropped = ConditionalTraining(tokens="segment", drop_fraction=0.999).examples(rows(scored(0.0, 1.0, 0.0)))
    assert dropped["text"].to_list() == ["a=1\nb = 2\nc=3\n"]
