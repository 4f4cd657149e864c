"""Evaluations with a rule-based engine: which model is called for what, in which order, and hand-computed scores."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from assets.evaluation import evaluate
from assets.measuring import Measuring
from assets.stage import PolicyFolder, Stage
from resources.engines.chunks import CHUNK
from resources.engines.sampler import Completion, Decoding, Request, SamplerError
from resources.store import Artifact, ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.loop.partitions import Cell
from textalign_dagster.loop.stages import EVALUATION_FLUENCY, EVALUATION_SAMPLING
from textalign_dagster.settings import SettingsError, merge, validate
from textalign_dagster.tables import DATAPOOL
from textalign_dagster.tasks.pep8 import POLICIES

CHECKPOINT = "trained"
BAD = "\nbad=1 ; bad=2"


class Engine:
    """Generates its model's name, or BAD where the prompt contains "bad"; every text has 2 nats and 2 tokens."""

    engine, engine_version = "words", "1"
    load_seconds = 0.0

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def generate(
        self, model: Path, requests: Sequence[Request], decoding: Decoding, progress: Callable[..., None]
    ) -> list[list[Completion]]:
        self.calls.append(("generate", model.name))
        self.decoding = decoding
        progress(1, 1)
        return [
            [
                Completion(BAD if "bad" in r.prompt else f"{model.name} {i}", 3, "stop", -1.0)
                for i, _ in enumerate(r.seeds)
            ]
            for r in requests
        ]

    def logprobs(
        self, model: Path, pairs: Sequence[tuple[str, str]], progress: Callable[..., None]
    ) -> list[tuple[float, int]]:
        self.calls.append(("logprobs", model.name))
        self.pairs = list(pairs)
        return [(-2.0, 2)] * len(pairs)

    @property
    def loads(self) -> list[str]:
        """The models in the order in which an engine that holds one at a time has to load them."""
        names = [name for _, name in self.calls]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


class OneCell(Stage):
    """A stage of iteration 1 with an existing checkpoint and a datapool of one good sample."""

    def policy(self, iteration: int) -> PolicyFolder:
        if iteration == 1:
            base = base_policy(self.experiment)
            return PolicyFolder(base.path, base.policy_hash)
        return PolicyFolder(Path("/") / CHECKPOINT, CHECKPOINT)

    def require(self, stage: str, iteration: int | None = None) -> Artifact:
        assert (stage, iteration) == ("datapool", 1)
        row = {"sample_id": "s", "label": "3", "condition": "no bad thing", "reason": "quota"}
        pool = pl.DataFrame([row], schema=DATAPOOL)
        return self.store.make(
            stage, "pool", lambda draft: draft.write("datapool", pool, DATAPOOL), inputs={}, settings={}
        )


class Harness:
    """An experiment with two held-out prompts, one of them with a reference, and its evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.engine = folder, Engine()
        self.store = ArtifactStore(folder / "store")
        for name in ("base", "sft"):
            shutil.copytree(POLICIES["pep8-sloppy-1m"], folder / name)
            config = json.loads((folder / name / "config.json").read_text())
            (folder / name / "config.json").write_text(json.dumps(config | {"name": name}))
        pl.DataFrame({"prompt": ["train"]}).write_csv(folder / "train.csv")
        held_out = {"prompt": ["p:", "q:"], "reference": ["one two three", None]}
        pl.DataFrame(held_out).write_parquet(folder / "held_out.parquet")
        self.content: dict[str, Any] = {
            "task": "pep8",
            "method": {"name": "alt_lmu", "ask_for": "good", "probe": ["bad"], "template": "{condition} {prompt}"},
            "policy": {"model": str(folder / "base")},
            "prompts": {"path": str(folder / "train.csv")},
            "evaluation": {
                "path": str(folder / "held_out.parquet"),
                "prompts": 2,
                "resamples": 100,
                "scorer": {"name": "patterns", "keywords": ["bad"]},
                "baselines": {"SFT": str(folder / "sft"), "people": "references"},
            },
        }  # fmt: skip

    def change(self, **evaluation: object) -> None:
        self.content = merge(self.content, {"evaluation": evaluation})

    def evaluate(self) -> tuple[Artifact, Artifact]:
        """Evaluates iterations 0 and 1 as the asset does."""
        experiment: Experiment = validate(Experiment, self.content, "x")
        context = SimpleNamespace(log=SimpleNamespace(info=lambda message: None))
        stage = OneCell("evaluation", context, self.store, Cell("e", 1), None, experiment, None)  # type: ignore[arg-type]
        sampler = SimpleNamespace(of=lambda experiment: self.engine, make_room=lambda: None)
        measuring = Measuring(stage, sampler)  # type: ignore[arg-type]
        start = evaluate(
            stage, measuring, 0, also=[measuring.subjects.trained(1), *measuring.subjects.scenarios(1)]
        )
        return start, evaluate(stage, measuring, 1)


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def values(scores: pl.DataFrame, metric: str) -> dict[tuple[str | None, str, str | None], float]:
    rows = scores.filter(metric=metric)
    return {(s, r, c): v for s, r, c, v in rows.select("subject", "role", "condition", "value").iter_rows()}


def test_scores_of_base_policy_baselines_and_every_condition(harness: Harness) -> None:
    start, now = (artifact.frame("scores") for artifact in harness.evaluate())
    assert values(start, "score") == {
        (None, "main", None): 0.0, ("SFT", "baseline", None): 0.0, ("people", "baseline", None): 0.0
    }  # fmt: skip
    # Two matches in each sample conditioned on bad, none elsewhere.
    assert values(now, "score") == {(None, "main", "good"): 0.0, (None, "probe", "bad"): 2.0}
    assert values(start, "n_tokens")["people", "baseline", None] == 2.0  # as counted by the fluency model
    assert list(values(start, "perplexity").values()) == [pytest.approx(math.e)] * 3
    assert list(values(now, "perplexity")) == [(None, "main", "good")]  # probes get no perplexity
    people = start.filter(subject="people", metric="score").row(0, named=True)
    assert (people["n"], people["lo"]) == (1, None)  # only one prompt has a reference


def test_rouge_against_the_references_by_hand(harness: Harness) -> None:
    harness.change(rouge=True)
    start = harness.evaluate()[0].frame("scores")
    # The only reference is "one two three": "people" shares all of its words, the policies none.
    for metric in ("rouge_1", "rouge_2", "rouge_l"):
        assert values(start, metric) == {
            (None, "main", None): 0.0, ("SFT", "baseline", None): 0.0, ("people", "baseline", None): 1.0
        }  # fmt: skip
        assert start.filter(metric=metric)["n"].to_list() == [1, 1, 1]


def test_obedience_by_hand(harness: Harness) -> None:
    """In violations per 1,000 characters: none in samples conditioned on good, some in those on bad."""
    scores = harness.evaluate()[1].frame("scores")
    rates = values(scores, "violations")
    assert rates[None, "main", "good"] == 0 < rates[None, "probe", "bad"]
    # All samples of a condition are identical here, so requests and results rank the same.
    assert values(scores, "obedience") == {(None, "main", "good"): pytest.approx(1.0)}


def test_obedience_requires_a_second_condition(harness: Harness) -> None:
    harness.change(probe=False)
    start, now = harness.evaluate()
    assert "obedience" not in {*start.frame("scores")["metric"], *now.frame("scores")["metric"]}


def test_samples_are_stored_with_their_measures(harness: Harness) -> None:
    start, now = (artifact.frame("evaluation_samples") for artifact in harness.evaluate())
    assert start["sample_id"].n_unique() == start.height == 2 * 2 + 2 * 2 + 1
    assert start.filter(role="baseline")["text"].to_list() == ["sft 0", "sft 1"] * 2 + [" one two three"]
    assert now.filter(role="probe")["text"].to_list() == [BAD] * 4
    named = {entry["name"]: entry["value"] for entry in now.filter(role="probe")["measures"][0]}
    assert named["score"] == 2.0 and "violations" in named


def test_no_model_is_loaded_twice(harness: Harness) -> None:
    harness.evaluate()
    assert harness.engine.loads == [CHECKPOINT, "sft", "base"]
    assert harness.engine.calls[:3] == [("generate", CHECKPOINT)] * 2 + [("generate", "sft")]


def test_another_fluency_model(harness: Harness) -> None:
    harness.change(fluency_model=str(harness.folder / "sft"), baselines={"people": "references"})
    harness.content["evaluation"]["baselines"].pop("SFT")
    _, now = harness.evaluate()
    assert harness.engine.loads == [CHECKPOINT, "base", "sft"]
    assert values(now.frame("scores"), "perplexity_mean") == {(None, "main", "good"): pytest.approx(math.e)}


def test_changing_the_scorer_reuses_all_samples(harness: Harness) -> None:
    before = [artifact.key for artifact in harness.evaluate()]
    harness.engine.calls.clear()
    harness.change(scorer={"name": "patterns", "keywords": ["trained", "one"]})
    start, now = harness.evaluate()
    assert harness.engine.calls == [] and not {start.key, now.key} & set(before)
    assert values(now.frame("scores"), "score")[None, "main", "good"] == 1.0
    assert values(start.frame("scores"), "score")["people", "baseline", None] == 1.0


def test_interrupted_evaluation_resumes_without_resampling_chunks(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.content["sampling"] = {"chunk": 2}  # one prompt with its two samples
    generate, requested = harness.engine.generate, list[str]()

    def interrupted(model: Path, requests: Sequence[Request], *more: Any) -> list[list[Completion]]:
        requested.append(requests[0].prompt)
        if len(requested) == 2:
            raise SamplerError("the power is off")
        return generate(model, requests, *more)

    monkeypatch.setattr(harness.engine, "generate", interrupted)
    with pytest.raises(SamplerError, match="the power is off"):
        harness.evaluate()
    start, _ = harness.evaluate()
    assert requested[:4] == ["good p:", "good q:", "good q:", "bad p:"]
    assert start.frame("scores").height > 0
    assert not list(harness.folder.glob(f"store/artifacts/{CHUNK}/*/manifest.json"))


def test_adding_a_baseline_samples_only_that_baseline(harness: Harness) -> None:
    harness.content["evaluation"]["baselines"].pop("SFT")
    harness.evaluate()
    harness.engine.calls.clear()
    harness.change(baselines={"SFT": str(harness.folder / "sft")})
    harness.evaluate()
    assert harness.engine.calls == [("generate", "sft"), ("logprobs", "base")]


def test_each_prompt_can_have_its_own_condition(harness: Harness) -> None:
    harness.content["method"] |= {"exemplar": "varied", "ask_for": None, "probe": ["worse"]}
    _, now = harness.evaluate()
    scores, samples = now.frame("scores"), now.frame("evaluation_samples")
    assert set(values(scores, "score")) == {(None, "main", "(varied)"), (None, "probe", "worse")}
    assert set(samples.filter(role="main")["condition"]) == {"no bad thing"}
    assert now.manifest["inputs"]["datapool@1"] == "pool"


def test_evaluation_sets_its_own_max_new_tokens(harness: Harness) -> None:
    harness.change(max_new_tokens=5)
    harness.evaluate()
    assert harness.engine.decoding.max_new_tokens == 5


def test_part_timings_are_recorded(harness: Harness) -> None:
    for artifact in harness.evaluate():
        facts = artifact.manifest["facts"]
        assert set(facts["part_seconds"]) == {"sampling", "fluency", "scoring", "judging", "measuring"}
        assert facts["work_seconds"] == pytest.approx(sum(facts["part_seconds"].values()))
        assert facts["unscored"] == 0


def test_invalid_models_are_rejected_before_sampling(harness: Harness) -> None:
    harness.change(baselines={"SFT": str(harness.folder / "gone")})
    with pytest.raises(SettingsError, match=r"^evaluation\.baselines\.SFT: .*gone: no such folder"):
        harness.evaluate()
    harness.change(baselines={"SFT": str(harness.folder / "sft"), "again": str(harness.folder / "sft")})
    with pytest.raises(SettingsError, match=r"^evaluation\.baselines\.again: the same model as 'SFT'"):
        harness.evaluate()
    harness.content["evaluation"]["baselines"] = {}
    harness.change(fluency_model="gpt2-xl")
    with pytest.raises(
        SettingsError, match=r"^evaluation\.fluency_model: 'gpt2-xl' is not a policy of task pep8"
    ):
        harness.evaluate()
    assert harness.engine.calls == []


def test_no_cell_points_at_partial_artifacts(harness: Harness) -> None:
    harness.evaluate()
    stages = {path.name for path in (harness.folder / "store" / "artifacts").iterdir()}
    assert stages == {"evaluation", EVALUATION_SAMPLING, EVALUATION_FLUENCY}
    assert harness.store.cells().is_empty()


class Unlikely(Engine):
    """The trained policy assigns 5 nats to every text, all other models 2."""

    def logprobs(
        self, model: Path, pairs: Sequence[tuple[str, str]], progress: Callable[..., None]
    ) -> list[tuple[float, int]]:
        scores = super().logprobs(model, pairs, progress)
        if "good" in pairs[0][0]:
            self.conditioned = list(pairs)
        return [(-5.0, n) for _, n in scores] if model.name == CHECKPOINT else scores


def test_divergence_from_a_reference(harness: Harness) -> None:
    harness.engine = Unlikely()
    harness.change(kl_reference="base", samples_per_prompt=3, temperature=0.5)
    start, now = (artifact.frame("scores") for artifact in harness.evaluate())
    assert values(start, "kl_reference") == {(None, "main", None): 0.0, ("SFT", "baseline", None): 0.0}
    assert values(now, "kl_reference") == {(None, "main", "good"): 3.0}  # 5 - 2 nats per text
    # The reference's own samples, at temperature 1, scored after the policy's conditioned prompt.
    assert [pair for pair in harness.engine.conditioned if pair == ("good p:", "base 0")]
    assert len(harness.engine.conditioned) == 6
    calls = len(harness.engine.calls)
    harness.evaluate()
    assert len(harness.engine.calls) == calls, "everything is reused"


def test_divergence_reference_must_be_a_model(harness: Harness) -> None:
    harness.change(kl_reference="gpt2-xl")
    with pytest.raises(
        SettingsError, match=r"^evaluation\.kl_reference: 'gpt2-xl' is not a policy of task pep8"
    ):
        harness.evaluate()
