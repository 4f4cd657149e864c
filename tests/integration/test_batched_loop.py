"""The loop with a judge behind the Batch API: a stage that does not wait for replies, and one that does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the extra `judges`")

from resources.store import ArtifactStore
from tests.integration.test_loop import ONE_STAGE
from tests.resources.judges.batch_endpoint import KEY, BatchEndpoint
from tests.toy import environment, textalign, toys
from textalign_dagster.settings import merge, write_yaml


def reply(question: str) -> str:
    score = len(question) % 4
    return json.dumps({"analysis": "Looked at.", "feedback": f"has {3 - score} flaws", "score": score})


@pytest.fixture
def endpoint() -> Iterator[BatchEndpoint]:
    server = BatchEndpoint(reply, ends=False).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_batched_iteration(tmp_path: Path, endpoint: BatchEndpoint) -> None:
    judge = {
        "model": "toy-judge",
        "base_url": endpoint.url,
        "api_key_env": "TOY_KEY",
        "template": "text_feedback",
        "batch": {"poll_s": 0.05},
    }
    method = {"ask_for": "has 0 flaws", "probe": []}
    changes = {"control": None, "iterations": 1, "method": method, "judge": judge}
    (tmp_path / "experiments").mkdir()
    toy = merge(toys()["toy"], changes)
    (tmp_path / "experiments" / "batched.yaml").write_text(write_yaml(toy), encoding="utf-8")
    env = environment(tmp_path / "home", tmp_path / "experiments") | {"TOY_KEY": KEY}

    # As run by the daemon: the stage does not wait, and the calls stay pending at the endpoint.
    for stage in ("prompt_draws", "generations"):
        textalign("batched|001", stage, env=env, program=(str(ONE_STAGE),))
    pending = textalign("batched|001", "feedback", env=env, program=(str(ONE_STAGE),), ok=False)
    assert "calls are with the Batch API" in pending.stderr
    assert len(endpoint.batches) == 1

    # From the command line: it waits for all replies, and sends nothing again.
    endpoint.ends = True
    textalign("run", "batched", env=env)
    assert set(endpoint.taken.values()) == {1}
    pointer = ArtifactStore(tmp_path / "home" / "store").pointer("batched", 1, "feedback")
    assert pointer is not None
    assert set(pointer.artifact.frame("feedback")["status"]) == {"ok"}
