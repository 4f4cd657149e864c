"""Scenarios: which samples are drawn and how, and hand-computed scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest

from resources.engines.sampler import Completion, Decoding, Request
from tests.assets.test_measuring import BAD, Engine, Harness, values
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import SCENARIO_SAMPLES


class Recording(Engine):
    """Records the model, requests and decoding settings of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.requested: list[tuple[str, list[tuple[str, int]], Decoding]] = []

    def generate(
        self, model: Path, requests: Sequence[Request], decoding: Decoding, progress: Callable[..., None]
    ) -> list[list[Completion]]:
        self.requested.append((model.name, [(r.prompt, len(r.seeds)) for r in requests], decoding))
        return super().generate(model, requests, decoding, progress)


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness(tmp_path)
    harness.engine = Recording()
    pl.DataFrame({"prompt": ["bad 1", "fine"]}).write_csv(tmp_path / "attacks.csv")
    return harness


def test_scenario_samples_are_drawn_as_configured_and_measured(harness: Harness, tmp_path: Path) -> None:
    attack = {"path": str(tmp_path / "attacks.csv"), "prefix": "> ", "samples": 5, "hits": 0.0}
    unprompted = {"samples": 30, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 7, "min_new_tokens": 2}
    harness.change(scenarios={"attack": attack, "unprompted": unprompted | {"banned_tokens": ["x"]}})
    start, now = harness.evaluate()
    engine = harness.engine
    assert isinstance(engine, Recording)
    sampled = {
        (model, tuple(prompts[:2]), len(prompts)): decoding for model, prompts, decoding in engine.requested
    }
    # Five samples of two prompts split into three and two; without a prompt, texts follow the end token alone.
    assert ("base", (("> bad 1", 3), ("> fine", 2)), 2) in sampled
    assert ("trained", (("good > bad 1", 3), ("good > fine", 2)), 2) in sampled
    end = "<|endoftext|>"
    decoding = sampled["base", ((end, 1), (end, 1)), 30]
    assert (decoding.temperature, decoding.top_p, decoding.max_new_tokens, decoding.min_new_tokens) == (
        0.7,
        0.9,
        7,
        2,
    )
    assert decoding.banned_tokens == ("x",)
    assert ("trained", (("good ", 1), ("good ", 1)), 30) in sampled

    scores, samples = start.frame("scores"), start.frame("scenario_samples")
    assert samples.schema == SCENARIO_SAMPLES
    assert samples.group_by("scenario", maintain_order=True).len().rows() == [
        ("attack", 5),
        ("unprompted", 30),
    ]
    assert samples.filter(scenario="attack")["text"].to_list() == [BAD, BAD, BAD, "base 0", "base 1"]
    # Twice the pattern "bad" in three of five samples.
    assert values(scores, "score")["attack", "scenario", None] == pytest.approx(6 / 5)
    assert values(scores, "hits") == {("attack", "scenario", None): pytest.approx(3 / 5)}
    worst = values(scores, "worst")
    assert worst["unprompted", "scenario", None] == 0 < worst["attack", "scenario", None]
    assert values(scores, "worst_of_25") == {("unprompted", "scenario", None): 0.0}
    # Without prompts, the bootstrap resamples samples.
    assert scores.filter(subject="unprompted", metric="score")["n"].to_list() == [30]
    assert values(now.frame("scores"), "score")["attack", "scenario", "good"] == pytest.approx(6 / 5)
    assert not scores.filter(role="scenario", metric="perplexity").height


def test_scenarios_require_no_additional_model_loads(harness: Harness) -> None:
    harness.evaluate()
    before = harness.engine.loads
    harness.engine, harness.store = Recording(), type(harness.store)(harness.folder / "other")
    harness.change(scenarios={"unprompted": {"samples": 2}})
    harness.evaluate()
    assert harness.engine.loads == before


def test_prompt_and_completion_can_be_scored_together(harness: Harness, tmp_path: Path) -> None:
    path = str(tmp_path / "attacks.csv")
    harness.change(
        scenarios={
            "apart": {"path": path, "samples": 2},
            "together": {"path": path, "samples": 2, "score_prompt": True},
        }
    )
    scores = harness.evaluate()[0].frame("scores")
    by_scenario = values(scores, "score")
    assert by_scenario["apart", "scenario", None] == 1.0  # two matches in the completion after "bad 1"
    assert by_scenario["together", "scenario", None] == 1.5  # plus one in the prompt


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        (
            {"min_new_tokens": 99},
            r"^evaluation\.scenarios\.mine\.min_new_tokens: 99, but completions have 64 tokens",
        ),
        ({"path": "/nowhere.csv"}, r"^/nowhere\.csv: no such prompt file"),
        (
            {"path": "train.csv"},
            r"^evaluation\.scenarios\.mine\.path: 1 prompts of .*train\.csv are trained on too",
        ),
    ],
)
def test_impossible_scenarios_are_rejected(
    harness: Harness, scenario: dict[str, object], problem: str
) -> None:
    if scenario.get("path") == "train.csv":
        scenario = {"path": str(harness.folder / "train.csv")}
    harness.change(scenarios={"mine": scenario})
    with pytest.raises(SettingsError, match=problem):
        harness.evaluate()
