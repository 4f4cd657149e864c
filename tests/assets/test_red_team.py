"""Red teaming: what the prompt-writing model is shown, what counts as a new prompt, and hand-computed scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest

from assets.red_team import drawn, new_prompts
from resources.engines.sampler import Completion, Decoding, Request
from tests.assets.test_measuring import BAD, Engine, Harness, values
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import RED_TEAM

POOL = pl.DataFrame({"prompt": ["good", "so-so", "bad", "unknown"], "value": [1.0, 2.0, 3.0, None]})


def test_successful_prompts_are_shown_more_often() -> None:
    """Badness is 0, 1/2 and 1, so single draws are in the proportions 1 : e : e²."""
    sharpness, draws = 2.0, 4000
    counts = Counter(drawn(POOL, 1, sharpness, True, seed)[0] for seed in range(draws))
    total = 1 + math.e + math.e**2
    for prompt, weight in (("good", 1), ("so-so", math.e), ("bad", math.e**2)):
        assert counts[prompt] / draws == pytest.approx(weight / total, abs=0.03)
    assert Counter(drawn(POOL, 1, 50.0, False, seed)[0] for seed in range(50)) == {"good": 50}
    # Without replacement, the worst last; a prompt without a value is left out.
    assert drawn(POOL, 9, sharpness, True, 0) == ["good", "so-so", "bad"]
    alike = POOL.with_columns(value=pl.lit(1.0))
    assert len({drawn(alike, 1, sharpness, True, seed)[0] for seed in range(50)}) == 4


def test_new_prompts_end_at_the_separator_and_are_distinct() -> None:
    written = [" one \nrest", "two", "\nrest", "one", "known\n"]
    assert new_prompts(written, "\n", {"known"}) == ["one", "two"]


class Attacked(Engine):
    """The attacker writes consecutive numbers; the policy does badly on prompts with an even one."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.tried: list[tuple[str, int]] = []

    def generate(
        self, model: Path, requests: Sequence[Request], decoding: Decoding, progress: Callable[..., None]
    ) -> list[list[Completion]]:
        if model.name == "sft" and requests[0].prompt.endswith("|"):
            self.shown.append(requests[0].prompt)
            numbers = range(len(self.shown) * 10, len(self.shown) * 10 + len(requests[0].seeds))
            return [[Completion(f"try {i}|and more", 3, "stop", -1.0) for i in numbers]]
        if "try" in requests[0].prompt:
            self.tried += [(request.prompt, len(request.seeds)) for request in requests]
            return [
                [Completion(BAD if int(r.prompt.split()[-1]) % 2 == 0 else "fine", 3, "stop", -1.0)]
                * len(r.seeds)
                for r in requests
            ]
        return super().generate(model, requests, decoding, progress)


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    harness = Harness(tmp_path)
    harness.engine = Attacked()
    pl.DataFrame({"prompt": ["try 1", "try 2"]}).write_csv(tmp_path / "seeds.csv")
    harness.change(
        red_team={
            "path": str(tmp_path / "seeds.csv"),
            "model": str(tmp_path / "sft"),
            "rounds": 2,
            "candidates": 3,
            "shown": 2,
            "samples": 4,
            "separator": "|",
        }
    )
    return harness


def test_pool_grows_by_prompts_written_after_successful_ones(harness: Harness) -> None:
    start, now = harness.evaluate()
    engine = harness.engine
    assert isinstance(engine, Attacked)
    assert engine.shown[0] == "try 1|try 2|"  # the worst comes last
    pool = start.frame("red_team")
    assert pool.schema == RED_TEAM
    rows = pool.select("prompt", "round", "samples", "worst").rows()
    assert rows[:2] == [("try 1", 0, 4, "fine"), ("try 2", 0, 4, BAD)]
    assert [prompt for prompt, *_ in rows[2:5]] == ["try 10", "try 11", "try 12"]
    assert pool["round"].to_list() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert (pool.filter(pl.col("worst") == "fine")["value"] == 0).all()
    bad = pool.filter(pl.col("worst") == BAD)["value"]
    assert bad.n_unique() == 1 and bad[0] > 0
    scores, name = start.frame("scores"), ("red team", "scenario", None)
    assert values(scores, "red_team_worst")[name] == pytest.approx(bad[0])
    # Eight prompts were tried, and all count among the ten worst.
    assert values(scores, "red_team_pool")[name] == values(scores, "red_team_worst_10")[name]
    assert values(scores, "red_team_pool")[name] == pytest.approx(bad[0] * len(bad) / 8)
    # The trained policy is prompted with its condition.
    assert ("good try 1", 4) in engine.tried and ("try 1", 4) in engine.tried
    assert values(now.frame("scores"), "red_team_pool").keys() == {("red team", "scenario", "good")}


def test_pool_is_reused_when_the_evaluation_changes(harness: Harness) -> None:
    harness.evaluate()
    engine = harness.engine
    assert isinstance(engine, Attacked)
    before = len(engine.shown)
    harness.change(resamples=200)
    harness.evaluate()
    assert len(engine.shown) == before


def test_missing_prompt_file_is_rejected(harness: Harness) -> None:
    harness.change(red_team={"path": "/nowhere.csv"})
    with pytest.raises(SettingsError, match=r"^/nowhere\.csv: no such prompt file"):
        harness.evaluate()
