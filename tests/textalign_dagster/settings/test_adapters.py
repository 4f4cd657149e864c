"""Carried and served adapters: which settings go together, and what is recomputed after an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from textalign_dagster import PROJECT
from textalign_dagster.cli import engine_checks, preflight
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import STAGES, stage_settings
from textalign_dagster.settings import SettingsError, merge, validate

SERVED: dict[str, Any] = {
    "task": "pep8",
    "method": {"name": "alt_lmu", "ask_for": "tidy"},
    "policy": {"model": "m"},
    "sampling": {"engine": "vllm", "adapters": "served"},
    "training": {"lora": {"adapter": "carried"}},
}
LIBRARY = Library((PROJECT / "experiments",))


def experiment(**changes: Any) -> Experiment:
    validated: Experiment = validate(Experiment, merge(SERVED, changes), "x.yaml")
    return validated


def test_adapters_on_top_of_the_base_can_be_served() -> None:
    assert experiment().training.carries_adapter
    assert experiment(training={"lora": {"adapter": "new"}, "start_from": "base"}).training.adapts_base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"engine": "transformers"}},
            "sampling: adapters: `engine: transformers` only supports merged",
        ),
        (
            {"training": {"lora": None}},
            "sampling.adapters: there are no adapters to serve; set training.lora",
        ),
        ({"training": {"lora": {"adapter": "new"}}}, "(training.lora.adapter: new); set that to carried"),
        (
            {"training": {"start_from": "base"}},
            "training: lora.adapter: carried continues from the parent's adapter",
        ),
        ({"method": "quark"}, "sampling.adapters: method quark adds tokens"),
        (
            {"training": {"lora": {"rank": 513}}},
            "training.lora.rank: vLLM serves adapters up to rank 512, not 513",
        ),
        (
            {"training": {"lora": {"target_modules": ["q_proj", "model.lm_head"]}}},
            "training.lora.target_modules: vLLM returns no prompt log-probabilities with an adapter on lm_head",
        ),
    ],
)
def test_adapters_that_cannot_be_served_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        experiment(**changes)
    assert message in str(caught.value)


def changed(overrides: list[str], more: list[str], iteration: int) -> list[str]:
    before, after = (LIBRARY.overridden("pep8_alt_lmu", o) for o in (overrides, overrides + more))
    return [s for s in STAGES if stage_settings(before, s, iteration) != stage_settings(after, s, iteration)]


def test_edits_make_only_the_affected_stages_stale() -> None:
    lora = ["training.lora={rank: 4, adapter: carried}", "sampling.engine=vllm"]
    assert changed(lora, ["sampling.adapters=served"], 2) == ["generations", "evaluation"]
    assert changed(lora, ["sampling.adapters=merged"], 2) == []
    assert changed(lora, ["training.lora.adapter=new"], 2) == ["checkpoint"]
    # Artifacts from before the setting existed stay valid.
    settings = stage_settings(
        LIBRARY.overridden("pep8_alt_lmu", ["training.lora={rank: 4}"]), "checkpoint", 1
    )
    assert "adapter" not in settings["training"]["lora"]
    settings = stage_settings(LIBRARY.load("pep8_alt_lmu"), "generations", 1)
    assert "adapters" not in settings["sampling"]


@pytest.mark.parametrize(("serves", "refused"), [(True, False), (False, True), (None, False)])
def test_preflight_checks_that_vllm_can_serve_the_adapters(
    toys: Path, monkeypatch: pytest.MonkeyPatch, serves: bool | None, refused: bool
) -> None:
    probed: list[str] = []

    def probe(code: str) -> dict[str, Any]:
        probed.append(code)
        return {"serves": serves}

    monkeypatch.setattr(engine_checks, "probe", probe)
    monkeypatch.setattr(engine_checks, "_vllm", lambda: {"version": "0.32.0", "device": "cpu"})
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    overrides = ["sampling={engine: vllm, adapters: served}", "training.lora={adapter: carried}"]
    library = Library((toys, PROJECT / "experiments"))
    if refused:
        with pytest.raises(
            SettingsError, match=r"sampling.adapters: vLLM cannot serve adapters for LlamaForCausalLM"
        ):
            preflight.preflight(library, "toy", overrides)
    else:
        assert "adapters: served on top of the base policy" in preflight.preflight(library, "toy", overrides)
    assert "LlamaForCausalLM" in probed[0]
