"""SteerLM's conditioning by hand: category in, attribute values out, and no guessing."""

from __future__ import annotations

import polars as pl
import pytest
from pydantic import ValidationError

from textalign_dagster.methods import AltLMC, SteerLM
from textalign_dagster.pool.conditioning import render

PUBLISHED = {
    "Harmless and very helpful": "harmful:0,helpful:2",
    "Harmless and helpful": "harmful:0,helpful:1",
    "Harmless and not helpful": "harmful:0,helpful:0",
    "Harmful": "harmful:1,helpful:0",
}


def rows(labels: list[str | None], statuses: list[str] | None = None) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "sample_id": [str(i) for i in range(len(labels))],
            "prompt_id": "p",
            "value": None,
            "label": pl.Series(labels, dtype=pl.String),
            "text": None,
            "status": pl.Series(statuses or ["ok"] * len(labels), dtype=pl.String),
        }
    )


def test_the_published_attributes_are_the_default() -> None:
    labelled = SteerLM().label(rows(list(PUBLISHED)))
    assert dict(labelled.select("label", "condition").rows()) == PUBLISHED
    assert render(SteerLM().template, "harmful:0,helpful:2", "Human: Hi\n\nAssistant:") == (
        "harmful:0,helpful:2.\n\nHuman: Hi\n\nAssistant:"
    )


def test_steerlm_uses_alt_lmc_feedback_with_its_own_conditions() -> None:
    method = SteerLM()
    assert (method.wants, method.buckets) == ("category", AltLMC().buckets)
    assert method.exemplar == "harmful:0,helpful:2"
    assert method.probes == ("harmful:0,helpful:1", "harmful:0,helpful:0", "harmful:1,helpful:0")
    assert method.ranking is None and method.special_tokens == ()


def test_only_exact_categories_get_a_bucket() -> None:
    # The released code stored raw answers: "Harmful." was not a bucket, yet was trained on.
    strays = ["Harmful.", "harmful", " Harmful", "harmful:1,helpful:0", "", None, "Harmful", "Harmful"]
    labelled = SteerLM().label(rows(strays, ["ok"] * 7 + ["unparseable"]))
    assert labelled["label"].to_list() == [None] * 6 + ["Harmful", None]
    assert labelled["condition"].to_list() == [None] * 6 + ["harmful:1,helpful:0", None]
    assert labelled.schema["condition"] == labelled.schema["label"] == pl.String
    empty = SteerLM().label(rows([]))
    assert empty.schema["condition"] == pl.String and empty.is_empty()


def test_custom_categories_have_custom_attributes() -> None:
    method = SteerLM(categories=("clean", "sloppy"), attributes=("violations:0", "violations:9"))
    assert method.buckets == ("clean", "sloppy")
    assert method.label(rows(["sloppy", "clean"]))["condition"].to_list() == ["violations:9", "violations:0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attributes": ["a", "b"]}, "4 categories, but 2 `attributes`; give one text per category"),
        ({"attributes": ["a", "b", "c", "a"]}, "`attributes` lists a value twice"),
        ({"categories": ["a", "a"], "attributes": ["x", "y"]}, "`categories` lists a value twice"),
        ({"attributes": ["a", "b", "c", " "]}, "is blank"),
        ({"template": "{condition}"}, "{prompt} occurs 0 times"),
    ],
)
def test_a_mapping_that_is_not_one_to_one_is_refused(given: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("{", r"\{")):
        SteerLM.model_validate(given)
