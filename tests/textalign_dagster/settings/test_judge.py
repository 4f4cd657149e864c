"""The judge's settings: what they reject, and that they never contain secrets."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from textalign_dagster.settings import SettingsError, describe, validate
from textalign_dagster.settings.judge import Judge, JudgePrices

GOOD: dict[str, Any] = {"model": "judge-1", "template": "quality"}
PASTED = "sk-proj-0123456789abcdef"


def problem(**settings: Any) -> str:
    with pytest.raises(SettingsError) as error:
        validate(Judge, GOOD | settings, "x.yaml")
    return str(error.value)


def test_defaults() -> None:
    judge: Judge = validate(Judge, GOOD, "x.yaml")
    assert judge.decoding.params() == {"temperature": 0.0, "max_tokens": 512}
    assert (judge.endpoint, judge.limits.concurrency) == ("https://api.openai.com/v1", 64)
    assert "NAME of the environment variable" in describe(judge)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url: not a URL"),
        ({"base_url": "http://me:word@host/v1"}, "base_url: the URL carries credentials"),
        ({"base_url": "http://host/v1?api-key=1"}, "base_url: the URL has a part after"),
        ({"base_url": "http://host/v1/chat/completions"}, "remove /chat/completions"),
        ({"decoding": {"extra": {"n": 2}}}, "'n' is set by repeats"),
        ({"decoding": {"extra": {"stream": True}}}, "replies are read whole"),
        ({"decoding": {"extra": {"auth": {"api_key": PASTED}}}}, "'auth.api_key' looks like a secret"),
        ({"budget_usd": 1.0}, "budget_usd needs prices"),
        ({"prices": {"input": 1.0, "output": 1.0, "as_of": "January"}}, "write it as 2026-01-31"),
        ({"ask": "score"}, "one of: text, category"),
        ({"ask": "ranking", "group": 2}, "group: `ask: ranking` judges one item per call"),
        ({"ask": "judgment", "group": 2}, "groups are for text, category, rating: remove it"),
        ({"ask": "rating", "pairs": 3}, "pairs: only `ask: ranking` compares samples"),
        ({"ask": "win", "repeats": 2}, "repeats: `ask: win` already asks every comparison twice"),
        ({"ask": "category", "scale": {"low": 0, "high": 1}}, "scale: `ask: category` returns no numbers"),
        ({"ask": "rating", "scale": {"low": 2, "high": 1}}, "low (2) must be below high (1)"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    assert message in problem(**settings)


@pytest.mark.parametrize("field", ["api_key_env", "api_key"])
def test_a_pasted_key_is_refused_and_not_repeated(field: str) -> None:
    message = problem(**{field: PASTED})
    assert field in message and PASTED not in message
    with pytest.raises(pydantic.ValidationError) as error:
        Judge(**GOOD, **{field: PASTED})
    assert PASTED not in str(error.value)


def test_one_endpoint_has_one_spelling() -> None:
    spellings = ["https://Host:443/v1/", "https://host/v1"]
    assert {Judge(**GOOD, base_url=url).endpoint for url in spellings} == {"https://host/v1"}
    assert Judge(**GOOD, base_url="http://[::1]:8000/v1").endpoint == "http://[::1]:8000/v1"


def test_prices() -> None:
    prices = JudgePrices(input=1.0, cached_input=0.1, output=4.0, as_of="2026-01-31")
    assert prices.usd(1_000_000, 500_000, 400_000) == pytest.approx(0.6 + 0.04 + 2.0)
    # More cached tokens than there are: all are cached.
    assert prices.usd(1_000_000, 0, 2_000_000) == pytest.approx(0.1)
