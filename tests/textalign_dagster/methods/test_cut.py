"""CUT's rows: which judgments find fault, and what is trained on."""

from __future__ import annotations

import polars as pl
import pytest

from tests.textalign_dagster.pool.test_examples import rows
from textalign_dagster.methods import CUT

JUDGMENTS = [
    ("Perfect.", "satisfied"),
    ("perfect", "satisfied"),
    ("  **Perfect!**", "satisfied"),
    ("The response is perfect, but long.", "judged"),
    ("E225 missing whitespace", "judged"),
    ("", None),
    (" \n", None),
    ("$ERROR$", None),
    (None, None),
]


def labelled(method: CUT, judgments: list[str | None], values: list[float | None]) -> pl.DataFrame:
    given = pl.DataFrame(
        {"value": values, "text": judgments, "status": ["ok"] * len(judgments)},
        schema={"value": pl.Float64, "text": pl.String, "status": pl.String},
    )
    return method.label(given)


def test_judgments_that_find_no_fault() -> None:
    texts = [text for text, _ in JUDGMENTS]
    found = labelled(CUT(), texts, [None] * len(texts))
    assert found["label"].to_list() == [label for _, label in JUDGMENTS]
    judged = found["label"] == "judged"
    assert found["condition"].to_list() == [
        text if fault else None for text, fault in zip(texts, judged.fill_null(False), strict=True)
    ]


def test_a_score_can_say_so() -> None:
    texts: list[str | None] = ["too long", "too long", "too long", "fine"]
    found = labelled(CUT(satisfied_score=7, satisfied=("fine",)), texts, [7.0, 6.9, None, None])
    assert found["label"].to_list() == ["satisfied", "judged", "judged", "satisfied"]


def test_failed_judgments_are_not_trained_on() -> None:
    given = pl.DataFrame({"value": [1.0], "text": ["wrong"], "status": ["failed"]})
    assert CUT().label(given)["label"].to_list() == [None]


@pytest.mark.parametrize(("share", "satisfied"), [(0.0, 0), (0.25, 2), (0.4, 3), (None, 6)])
def test_satisfied_samples_beside_judged_ones(share: float | None, satisfied: int) -> None:
    conditions = ["E225"] * 8 + [None] * 6
    drawn = rows(*({"sample_id": f"s{i}", "condition": said} for i, said in enumerate(conditions)))
    found = CUT(satisfied_per_judged=share).examples(drawn)
    judged = found.filter(pl.col("condition").is_not_null())
    assert judged.height == 8 and found.height == 8 + satisfied
    assert judged["second_prompt"].to_list() == judged["prompt"].to_list()
    assert found.filter(pl.col("condition").is_null())["second_prompt"].null_count() == satisfied
    again = CUT(satisfied_per_judged=share).examples(drawn.sample(fraction=1.0, shuffle=True, seed=1))
    assert set(again["example_id"]) == set(found["example_id"])
