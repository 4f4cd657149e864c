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


def test_rwr_weighs_by_reward() -> None:
    found = RWR(beta=2.0, highest=3.0).examples(KNOWN)
    weights = dict(found.select("sample_id", "weight").iter_rows())
    assert weights == pytest.approx(
        {"a": math.exp(0.5), "b": 1.0, "c": math.exp(-0.5), "d": 3.0}  # e^1.5 is above 3
    )


def test_grpo_groups_a_prompts_samples() -> None:
    found = GRPO().examples(KNOWN)
    assert found["sample_id"].to_list() == ["a", "b", "c", "d"]
    assert set(found["role"]) == {"member"} and found["group_id"].n_unique() == 1


def test_kto_reads_each_text_after_another_prompt_too() -> None:
    pool = rows(*({"sample_id": f"{p}{i}", "prompt_id": p, "prompt": f"def {p}:", "value": float(i)}
                  for p in "pqr" for i in range(3)))  # fmt: skip
    found = KTO(threshold=1.0).examples(pool)
    assert found.height == 9 and found["group_id"].null_count() == 9
    assert set(found.filter(role="rejected")["sample_id"]) == {"p0", "q0", "r0"}
    assert set(found.filter(role="chosen")["reward"]) == {1.0, 2.0}
    assert found.filter(pl.col("second_prompt") == pl.col("prompt")).is_empty()
    assert set(found["second_prompt"]) == set(found["prompt"])
    shuffled = KTO(threshold=1.0).examples(pool.reverse())
    assert found.sort("example_id").equals(shuffled.sort("example_id"))
    assert KTO().examples(pool.clear()).is_empty()
    with pytest.raises(ValueError, match=r"the same prompt.*prompts\.per_iteration"):
        KTO().examples(KNOWN)


def test_csft_compares_samples_of_a_prompt() -> None:
    """Best with worst, second best with second worst; e and f are equal; a fifth one in the middle."""
    given = pl.concat([SIX, rows({"sample_id": "g", "value": 1.5})]).with_columns(
        status=pl.when(pl.col("sample_id") == "g").then(pl.lit("failed")).otherwise(pl.lit("ok"))
    )
    found = CSFT().label(given)
    good, bad = "<|good|>", "<|bad|>"
    assert dict(found.select("sample_id", "condition").iter_rows()) == {
        "a": bad, "b": good, "c": good, "d": bad, "e": None, "f": None, "g": None,
    }  # fmt: skip
    fine = CSFT().label(given.with_columns(status=pl.lit("ok")))
    assert fine["label"].to_list() == [bad, good, good, bad, None, None, None]  # g is in the middle
    assert fine["sample_id"].to_list() == given["sample_id"].to_list()
    assert CSFT().special_tokens == (good, bad) and CSFT().exemplar == good


def test_conditional_training_labels_by_a_threshold() -> None:
    given = KNOWN.with_columns(status=pl.Series(["ok", "ok", "ok", "failed", "ok", "ok"]))
    found = ConditionalTraining().label(given)
    good, bad = "<|aligned|>", "<|misaligned|>"
    assert found["label"].to_list() == found["condition"].to_list() == [good, good, bad, None, None, None]
    assert ConditionalTraining().exemplar == good and ConditionalTraining().special_tokens == (good, bad)


def test_some_samples_are_trained_on_without_their_token() -> None:
    many = rows(*({"sample_id": f"s{i}", "condition": "<|aligned|>"} for i in range(1000)))
    for share, bound in ((0.0, 0), (0.1, 40)):
        found = ConditionalTraining(drop_fraction=share).examples(many)
        assert abs(found["condition"].null_count() - 1000 * share) <= bound and found.height == 1000


def test_a_batch_holds_what_is_read_together(tmp_path: Path) -> None:
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
    found = RankingRewardModel().examples(SIX)
    assert found.filter(role="chosen")["sample_id"].to_list() == ["b", "c"]  # e and f are equal
    assert RankingRewardModel(pairs_per_prompt=1).examples(SIX).height == 2
    assert RankingRewardModel(margin=2.5).examples(SIX)["sample_id"].to_list() == ["b", "d"]


def scored(*scores: float, text: str = "a=1\nb = 2\nc=3\n", sample_id: str = "d0") -> dict[str, object]:
    ends = [4, 10, 14]
    spans = [{"start": a, "end": b, "score": s} for a, b, s in zip([0, *ends], ends, scores, strict=False)]
    return {"sample_id": sample_id, "text": text, "spans": spans}


def test_control_tokens_by_segment_stand_in_the_text_and_belong_to_its_spans() -> None:
    method = ConditionalTraining(tokens="segment", drop_fraction=0.0)
    found = method.examples(rows(scored(0.25, 0.0, 1 / 3)))
    good, bad = "<|aligned|>", "<|misaligned|>"
    assert found["text"].to_list() == [f"{bad}a=1\n{good}b = 2\n{bad}c=3\n"]
    assert found["condition"].to_list() == [None]
    (text,), (spans,) = found["text"], found["spans"]
    assert [(text[s["start"] : s["end"]], s["score"]) for s in spans] == [
        (f"{bad}a=1\n", 0.25),
        (f"{good}b = 2\n", 0.0),
        (f"{bad}c=3\n", 1 / 3),
    ]


def test_a_quantile_of_the_segments_and_documents_that_spell_a_token() -> None:
    """Scores 0.25, 0, 1/3, 0: the better half has a score of 0 or 0.25 at most (nearest rank)."""
    method = ConditionalTraining(tokens="segment", drop_fraction=0.0, quantile=0.5)
    spelled = scored(0.0, 0.0, 0.0, text="x = '<|aligned|>'\n", sample_id="d2")
    found = method.examples(rows(scored(0.5, 0.25, 1 / 3), scored(0.0, 0.0, 0.25, sample_id="d1"), spelled))
    assert found.height == 2 and found["text"].str.count_matches(r"<\|aligned\|>").sum() == 4
    assert found["text"].str.count_matches(r"<\|misaligned\|>").sum() == 2
    with pytest.raises(ValidationError, match="`threshold` and `quantile` are mutually exclusive"):
        ConditionalTraining(quantile=0.5, threshold=0.0)


def test_a_policy_that_knows_segments_writes_the_good_token_itself() -> None:
    by_segment, by_sample = ConditionalTraining(tokens="segment"), ConditionalTraining()
    assert by_segment.banned_tokens == ("<|misaligned|>",) and by_segment.probes == ()
    assert by_segment.sweep == ("<|aligned|>",) and by_segment.wants == "spans"
    assert by_sample.banned_tokens == by_sample.special_tokens and by_sample.probes == ("<|misaligned|>",)
    assert by_sample.wants == "reward" and len(by_sample.sweep) == 2
    dropped = ConditionalTraining(tokens="segment", drop_fraction=0.999).examples(rows(scored(0.0, 1.0, 0.0)))
    assert dropped["text"].to_list() == ["a=1\nb = 2\nc=3\n"]
