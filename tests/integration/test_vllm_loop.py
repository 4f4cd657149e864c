"""The loop with `sampling.engine: vllm`: one engine for the samples and evaluations of all iterations."""

from __future__ import annotations

from pathlib import Path

import pytest

from resources.engines.transformers.sampler import TransformersSampler
from tests.integration.conftest import Place, new_place
from tests.resources.engines import vllm_models
from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.pool.conditioning import render

pytestmark = pytest.mark.usefixtures("quick")

COUNTED = Path(__file__).with_name("counted.py")
ENGINE = ("--set", "sampling.engine=vllm")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """Two iterations of the toy, sampled by vLLM; and the name of that variant."""
    vllm_models.needed()
    place = new_place(tmp_path_factory.mktemp("vllm") / "place")
    log = str(place.folder / "workers")
    place.textalign(log, "run", "toy", "--no-control", *ENGINE, program=(str(COUNTED),))
    return place, "toy+sampling.engine=vllm"


def test_one_engine_serves_all_iterations(sampled: tuple[Place, str]) -> None:
    place, name = sampled
    assert (place.folder / "workers").read_text().split() == ["resources.engines.vllm.worker"]
    for iteration in (1, 2):
        rows = place.frame(name, iteration, "generations")
        assert set(rows["engine"]) == {"vllm"} and rows["engine_version"].str.contains("worker-").all()
        assert rows["n_tokens"].unique().to_list() == [8]
        assert (rows["logprob"] < 0).all()
        scores = place.frame(name, iteration, "evaluation", "scores")
        assert {"perplexity", "violations"} <= set(scores["metric"])
    # The second iteration's samples come from its own policy.
    policies = [place.frame(name, k, "generations")["policy_hash"][0] for k in (1, 2)]
    assert policies[0] != policies[1]


def test_samples_come_from_the_checkpoint(sampled: tuple[Place, str]) -> None:
    """The weights were loaded into the running engine, including the output head (tied to the embeddings)."""
    place, name = sampled
    rows = place.frame(name, 2, "generations")
    folder = place.artifact(name, 1, "checkpoint").path("model")
    template = Library((place.experiments, PROJECT / "experiments")).load("toy").method.template
    pairs = [
        (render(template, condition, prompt), text)
        for condition, prompt, text in rows.select("condition", "prompt", "text").rows()
    ]
    with TransformersSampler(threads=1) as embedded:
        scores = embedded.logprobs(folder, pairs)
    same = [  # samples whose text tokenizes to the tokens that were drawn
        (logprob, total)
        for logprob, tokens, (total, count) in zip(rows["logprob"], rows["n_tokens"], scores, strict=True)
        if tokens == count
    ]
    assert len(same) >= 3
    assert [sampled_logprob for sampled_logprob, _ in same] == pytest.approx(
        [scored for _, scored in same], abs=1e-3
    )


def test_vllm_runtime_settings_do_not_change_samples(sampled: tuple[Place, str]) -> None:
    place, name = sampled
    more = (*ENGINE, "--set", "sampling.vllm.kv_cache_gib=2", "--set", "sampling.batch_size=8")
    done = place.textalign("run", "toy", "--no-control", *more)
    variant = next(word.split("|")[0] for word in done.stdout.split() if "|002" in word)
    assert variant != name
    for stage in ("generations", "evaluation"):
        assert place.artifact(variant, 2, stage).key == place.artifact(name, 2, stage).key
