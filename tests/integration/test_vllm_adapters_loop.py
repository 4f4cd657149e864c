"""The loop with one adapter that every iteration trains further, and an engine that serves it on top of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from resources.engines.transformers.sampler import TransformersSampler
from tests.integration.conftest import Place, new_place
from tests.resources.engines import vllm_models
from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.pool.conditioning import render

pytestmark = pytest.mark.usefixtures("quick")

CALLED = Path(__file__).with_name("called.py")
OWN = """extends: toy
control: null
sampling: {engine: vllm, adapters: served}
training:
  learning_rate: 0.01
  lora: {rank: 4, alpha: 8.0, adapter: carried}
  optimizer_state: carried
"""
peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, list[dict[str, Any]]]:
    """Two iterations, and the calls to workers during them."""
    vllm_models.needed()
    place = new_place(tmp_path_factory.mktemp("adapters") / "place")
    (place.experiments / "own.yaml").write_text(OWN)
    log = place.folder / "calls"
    place.textalign(str(log), "run", "own", program=(str(CALLED),))
    return place, [json.loads(line) for line in log.read_text().splitlines()]


def test_one_engine_and_one_base_for_all_iterations(sampled: tuple[Place, list[dict[str, Any]]]) -> None:
    place, calls = sampled
    assert {call["worker"] for call in calls} == {"resources.engines.vllm.worker"}
    assert len({call["pid"] for call in calls}) == 1  # started once
    assert len({call["model"] for call in calls}) == 1  # and its weights are loaded once
    checkpoints = [place.artifact("own", k, "checkpoint").path("beside") / "adapter" for k in (1, 2)]
    adapters = list(dict.fromkeys(call["adapter"] for call in calls))
    assert set(adapters) == {None, *map(str, checkpoints)} and adapters[0] is None
    assert calls[-1]["adapter"] is None  # the base computes the fluency of the second iteration's samples
    for k in (1, 2):
        assert place.frame("own", k, "generations")["engine_version"].str.ends_with("+adapters").all()


def test_samples_come_from_the_checkpoint(sampled: tuple[Place, list[dict[str, Any]]]) -> None:
    place, calls = sampled
    rows = place.frame("own", 2, "generations")
    checkpoint = place.artifact("own", 1, "checkpoint")
    assert set(rows["policy_hash"]) == {checkpoint.manifest["facts"]["policy_hash"]}
    template = Library((place.experiments, PROJECT / "experiments")).load("own").method.template
    pairs = [
        (render(template, condition, prompt), text)
        for condition, prompt, text in rows.select("condition", "prompt", "text").rows()
    ]
    with TransformersSampler(threads=1) as embedded:
        scores = embedded.logprobs(checkpoint.path("model"), pairs)
        base = embedded.logprobs(Path(calls[0]["model"]), pairs)
    same = [  # samples whose text tokenizes to the tokens that were drawn
        (logprob, total, before)
        for logprob, tokens, (total, count), (before, _) in zip(
            rows["logprob"], rows["n_tokens"], scores, base, strict=True
        )
        if tokens == count
    ]
    assert len(same) >= 3
    assert [sampled_logprob for sampled_logprob, _, _ in same] == pytest.approx(
        [scored for _, scored, _ in same], abs=1e-3
    )
    # The base scores them differently.
    assert max(abs(sampled_logprob - before) for sampled_logprob, _, before in same) > 0.01


def test_both_checkpoints_equal_the_base_with_an_adapter(sampled: tuple[Place, list[dict[str, Any]]]) -> None:
    place, calls = sampled
    ids = torch.arange(2, 40)[None]
    outputs = []
    for k in (1, 2):
        checkpoint = place.artifact("own", k, "checkpoint")
        base = AutoModelForCausalLM.from_pretrained(calls[0]["model"])
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(checkpoint.path("model"))(ids).logits
            adapted = peft.PeftModel.from_pretrained(base, checkpoint.path("beside") / "adapter")(ids).logits
        assert torch.allclose(merged, adapted, atol=1e-4)
        outputs.append(merged)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert "checkpoint@1" in place.artifact("own", 2, "checkpoint").manifest["inputs"]
    assert "base_policy" in place.artifact("own", 2, "checkpoint").manifest["inputs"]
