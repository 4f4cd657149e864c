"""A judge that is a real model behind a real server: vLLM on the CPU, its replies constrained to a schema.

The model is random, and its replies can be parsed all the same: the server enforces their form. Their content
is not tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.views import connect
from tests.integration.conftest import Place, new_place
from tests.integration.model_server import save_judge, serving
from tests.resources.engines import vllm_models
from tests.toy import OVERRIDES
from textalign_dagster.settings import merge, nested, parse_override, write_yaml

pytest.importorskip("openai", reason="needs the extra `judges`")
ONE_STAGE = Path(__file__).with_name("one_stage.py")
RATING = {
    "name": "brief_rating",
    "version": 1,
    "ask": "rating",
    "explain": False,
    "scale": {"low": 1, "high": 7},
    "system": "Grade the response with a whole number from {scale_low} to {scale_high}.",
    "user": "{prompt}\n\n{response}",
}


@pytest.fixture(scope="module")
def judge_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    vllm_models.needed()
    folder = tmp_path_factory.mktemp("judge")
    # Without whitespace between tokens: a random model might indent forever.
    compact = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    with serving(save_judge(folder / "model"), "tiny-judge", folder / "server.log",
                 "--structured-outputs-config", compact) as url:  # fmt: skip
        yield url


@pytest.fixture(scope="module")
def judged(judge_url: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Toy experiments with that judge, which differ in the question."""
    place = new_place(tmp_path_factory.mktemp("judged") / "place")
    template = place.folder / "brief_rating.yaml"
    template.write_text(write_yaml(RATING), encoding="utf-8")
    common: dict[str, Any] = {"control": None, "iterations": 1}
    for override in OVERRIDES[1:]:
        common = merge(common, nested(*parse_override(override)))

    def experiment(name: str, extends: str, ask: str, template: str, **more: Any) -> None:
        judge = {
            "model": "tiny-judge",
            "base_url": judge_url,
            "api_key_env": None,
            "template": template,
            "ask": ask,
            "structured": "json_schema",
            "decoding": {"temperature": 1.0, "seed": 7, "max_tokens": 256},
            "limits": {"concurrency": 8, "attempts": 1},
        }
        content = merge({"extends": extends, **common, "judge": judge}, more)
        (place.experiments / f"{name}.yaml").write_text(write_yaml(content), encoding="utf-8")

    experiment("rated", "pep8_alt_rm", "rating", str(template), datapool={"shares": None})
    # A random judge's sentences can be empty, which no parser should accept.
    lax = {"max_unusable_feedback": 1.0}
    experiment("told", "pep8_alt_lmu", "text", "text_feedback", checks=lax)
    experiment("ranked", "pep8_alt_rm", "ranking", "ranking", datapool={"shares": None}, checks=lax)
    return place


def test_an_iteration_with_a_served_judge(judged: Place) -> None:
    judged.textalign("run", "rated", "--no-control")
    rows = judged.frame("rated", 1, "feedback")
    assert rows.height == 12 and set(rows["status"]) == {"ok"}
    assert rows["value"].is_between(1, 7).all() and rows["value"].n_unique() > 1
    assert judged.frame("rated", 1, "datapool").filter("drawn").height > 0
    assert judged.frame("rated", 1, "evaluation", "scores").height > 0

    columns = ("raw_reply", "status", "tokens_in", "tokens_out", "finish_reason")
    with connect(judged.store) as database:
        records = database.execute(f"select {', '.join(columns)} from feedback_calls").fetchall()
    calls = pl.DataFrame(records, columns, orient="row")
    assert set(calls["status"]) == {"ok"} and set(calls["finish_reason"]) == {"stop"}
    # Each reply as the server returned it: it contains the value, and nothing else.
    replies = [json.loads(reply) for reply in calls["raw_reply"]]
    assert all(set(reply) == {"rating"} for reply in replies)
    assert {reply["rating"] for reply in replies} == set(rows["value"])
    assert (calls["tokens_in"] > 50).all() and calls["tokens_out"].is_between(3, 60).all()

    again = judged.textalign("run", "rated", "--no-control")
    assert "Traceback" not in again.stderr
    with connect(judged.store) as database:
        assert database.execute("select count(*) from feedback_calls").fetchall() == [(calls.height,)]


@pytest.mark.parametrize("name", ["told", "ranked"])
def test_other_questions(judged: Place, name: str) -> None:
    for stage in ("prompt_draws", "generations", "feedback"):
        judged.textalign(f"{name}|001", stage, program=(str(ONE_STAGE),))
    rows = judged.frame(name, 1, "feedback")
    ok = rows.filter(pl.col("status") == "ok")
    assert rows.height == 12 and ok.height >= 6
    assert rows.filter(pl.col("status") != "ok")["reason"].null_count() == 0
    if name == "told":
        assert ok["text"].str.len_chars().min() > 0 and ok["value"].is_between(0, 3).all()
    else:
        pairs = judged.frame("ranked", 1, "feedback", "pairs")
        assert pairs.height == 4 * 3  # three samples for each of four prompts
        assert ok["value"].is_between(0, 1).all()
