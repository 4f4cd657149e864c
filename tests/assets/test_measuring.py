"""An evaluation with an engine that answers by rule: who is asked what, in which order, and the numbers by hand."""

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
    """Says its model's name, or something bad when asked for it; every text has 2 nats and 2 tokens."""

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
        """The models in the order in which an engine that holds one of them has to load them."""
        names = [name for _, name in self.calls]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


class OneCell(Stage):
    """A stage of iteration 1 whose checkpoint exists, and a datapool with one good sample."""

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


class Place:
    """An experiment over two held-out prompts with references, and what its evaluation comes to."""

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
        """Iteration 0 and 1, evaluated as the asset does it."""
        experiment: Experiment = validate(Experiment, self.content, "x")
        context = SimpleNamespace(log=SimpleNamespace(info=lambda message: None))
        stage = OneCell("evaluation", context, self.store, Cell("e", 1), None, experiment, None)  # type: ignore[arg-type]
        sampler = SimpleNamespace(of=lambda experiment: self.engine, make_room=lambda: None)
        measuring = Measuring(stage, sampler)  # type: ignore[arg-type]
        start = evaluate(stage, measuring, 0, also=[measuring.trained(1), *measuring.scenarios(1)])
        return start, evaluate(stage, measuring, 1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def values(scores: pl.DataFrame, metric: str) -> dict[tuple[str | None, str, str | None], float]:
    found = scores.filter(metric=metric)
    return {(s, r, c): v for s, r, c, v in found.select("subject", "role", "condition", "value").iter_rows()}


def test_scores_of_the_base_of_baselines_and_under_every_condition(place: Place) -> None:
    start, now = (made.frame("scores") for made in place.evaluate())
    assert values(start, "score") == {
        (None, "main", None): 0.0, ("SFT", "baseline", None): 0.0, ("people", "baseline", None): 0.0
    }  # fmt: skip
    # Two of the patterns in each sample that was asked for bad; none elsewhere.
    assert values(now, "score") == {(None, "main", "good"): 0.0, (None, "probe", "bad"): 2.0}
    assert values(start, "n_tokens")["people", "baseline", None] == 2.0  # as the fluency model counts
    assert list(values(start, "perplexity").values()) == [pytest.approx(math.e)] * 3
    assert list(values(now, "perplexity")) == [(None, "main", "good")]  # probes are not read
    people = start.filter(subject="people", metric="score").row(0, named=True)
    assert (people["n"], people["lo"]) == (1, None)  # one of the prompts has a reference


def test_rouge_against_the_references_by_hand(place: Place) -> None:
    place.change(rouge=True)
    start = place.evaluate()[0].frame("scores")
    # The only reference is "one two three": people share all of its words with it, policies none.
    for metric in ("rouge_1", "rouge_2", "rouge_l"):
        assert values(start, metric) == {
            (None, "main", None): 0.0, ("SFT", "baseline", None): 0.0, ("people", "baseline", None): 1.0
        }  # fmt: skip
        assert start.filter(metric=metric)["n"].to_list() == [1, 1, 1]


def test_obedience_by_hand(place: Place) -> None:
    """By violations per 1,000 characters: none in the samples asked for good, some in those asked for bad."""
    scores = place.evaluate()[1].frame("scores")
    rates = values(scores, "violations")
    assert rates[None, "main", "good"] == 0 < rates[None, "probe", "bad"]
    # All samples of a condition are alike here: what was asked for and what came are in one order.
    assert values(scores, "obedience") == {(None, "main", "good"): pytest.approx(1.0)}


def test_without_a_second_condition_nobody_obeys(place: Place) -> None:
    place.change(probe=False)
    start, now = place.evaluate()
    assert "obedience" not in {*start.frame("scores")["metric"], *now.frame("scores")["metric"]}


def test_samples_are_kept_with_their_numbers(place: Place) -> None:
    start, now = (made.frame("evaluation_samples") for made in place.evaluate())
    assert start["sample_id"].n_unique() == start.height == 2 * 2 + 2 * 2 + 1
    assert start.filter(role="baseline")["text"].to_list() == ["sft 0", "sft 1"] * 2 + [" one two three"]
    assert now.filter(role="probe")["text"].to_list() == [BAD] * 4
    named = {entry["name"]: entry["value"] for entry in now.filter(role="probe")["measures"][0]}
    assert named["score"] == 2.0 and "violations" in named


def test_no_model_is_loaded_twice(place: Place) -> None:
    place.evaluate()
    assert place.engine.loads == [CHECKPOINT, "sft", "base"]
    assert place.engine.calls[:3] == [("generate", CHECKPOINT)] * 2 + [("generate", "sft")]


def test_another_model_reads_for_fluency(place: Place) -> None:
    place.change(fluency_model=str(place.folder / "sft"), baselines={"people": "references"})
    place.content["evaluation"]["baselines"].pop("SFT")
    _, now = place.evaluate()
    assert place.engine.loads == [CHECKPOINT, "base", "sft"]
    assert values(now.frame("scores"), "perplexity_mean") == {(None, "main", "good"): pytest.approx(math.e)}


def test_another_scorer_samples_nothing_again(place: Place) -> None:
    before = [made.key for made in place.evaluate()]
    place.engine.calls.clear()
    place.change(scorer={"name": "patterns", "keywords": ["trained", "one"]})
    start, now = place.evaluate()
    assert place.engine.calls == [] and not {start.key, now.key} & set(before)
    assert values(now.frame("scores"), "score")[None, "main", "good"] == 1.0
    assert values(start.frame("scores"), "score")["people", "baseline", None] == 1.0


def test_an_interrupted_evaluation_samples_no_chunk_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.content["sampling"] = {"chunk": 2}  # a prompt with its two samples
    generate, asked = place.engine.generate, list[str]()

    def interrupted(model: Path, requests: Sequence[Request], *more: Any) -> list[list[Completion]]:
        asked.append(requests[0].prompt)
        if len(asked) == 2:
            raise SamplerError("the power is off")
        return generate(model, requests, *more)

    monkeypatch.setattr(place.engine, "generate", interrupted)
    with pytest.raises(SamplerError, match="the power is off"):
        place.evaluate()
    start, _ = place.evaluate()
    assert asked[:4] == ["good p:", "good q:", "good q:", "bad p:"]
    assert start.frame("scores").height > 0
    assert not list(place.folder.glob(f"store/artifacts/{CHUNK}/*/manifest.json"))


def test_one_more_baseline_samples_only_that_one(place: Place) -> None:
    place.content["evaluation"]["baselines"].pop("SFT")
    place.evaluate()
    place.engine.calls.clear()
    place.change(baselines={"SFT": str(place.folder / "sft")})
    place.evaluate()
    assert place.engine.calls == [("generate", "sft"), ("logprobs", "base")]


def test_each_prompt_may_be_asked_for_a_condition_of_its_own(place: Place) -> None:
    place.content["method"] |= {"exemplar": "varied", "ask_for": None, "probe": ["worse"]}
    _, now = place.evaluate()
    scores, samples = now.frame("scores"), now.frame("evaluation_samples")
    assert set(values(scores, "score")) == {(None, "main", "(varied)"), (None, "probe", "worse")}
    assert set(samples.filter(role="main")["condition"]) == {"no bad thing"}
    assert now.manifest["inputs"]["datapool@1"] == "pool"


def test_a_cut_of_its_own(place: Place) -> None:
    place.change(max_new_tokens=5)
    place.evaluate()
    assert place.engine.decoding.max_new_tokens == 5


def test_what_took_how_long_is_recorded(place: Place) -> None:
    for made in place.evaluate():
        facts = made.manifest["facts"]
        assert set(facts["part_seconds"]) == {"sampling", "fluency", "scoring", "judging", "measuring"}
        assert facts["work_seconds"] == pytest.approx(sum(facts["part_seconds"].values()))
        assert facts["unscored"] == 0


def test_a_missing_baseline_is_refused_before_anything_is_sampled(place: Place) -> None:
    place.change(baselines={"SFT": str(place.folder / "gone")})
    with pytest.raises(SettingsError, match=r"^evaluation\.baselines\.SFT: .*gone: no such folder"):
        place.evaluate()
    place.change(baselines={"SFT": str(place.folder / "sft"), "again": str(place.folder / "sft")})
    with pytest.raises(SettingsError, match=r"^evaluation\.baselines\.again: the same model as 'SFT'"):
        place.evaluate()
    place.content["evaluation"]["baselines"] = {}
    place.change(fluency_model="gpt2-xl")
    with pytest.raises(
        SettingsError, match=r"^evaluation\.fluency_model: 'gpt2-xl' is not a policy of task pep8"
    ):
        place.evaluate()
    assert place.engine.calls == []


def test_parts_are_pointed_at_by_no_cell(place: Place) -> None:
    place.evaluate()
    stages = {path.name for path in (place.folder / "store" / "artifacts").iterdir()}
    assert stages == {"evaluation", EVALUATION_SAMPLING, EVALUATION_FLUENCY}
    assert place.store.cells().is_empty()


class Unlikely(Engine):
    """The trained policy gives every text 5 nats, all others 2."""

    def logprobs(
        self, model: Path, pairs: Sequence[tuple[str, str]], progress: Callable[..., None]
    ) -> list[tuple[float, int]]:
        found = super().logprobs(model, pairs, progress)
        if "good" in pairs[0][0]:
            self.asked = list(pairs)
        return [(-5.0, n) for _, n in found] if model.name == CHECKPOINT else found


def test_the_divergence_from_a_reference(place: Place) -> None:
    place.engine = Unlikely()
    place.change(kl_reference="base", samples_per_prompt=3, temperature=0.5)
    start, now = (made.frame("scores") for made in place.evaluate())
    assert values(start, "kl_reference") == {(None, "main", None): 0.0, ("SFT", "baseline", None): 0.0}
    assert values(now, "kl_reference") == {(None, "main", "good"): 3.0}  # 5 - 2 nats a text
    # The reference's own samples, at temperature 1, read as the policy is asked.
    assert [pair for pair in place.engine.asked if pair == ("good p:", "base 0")]
    assert len(place.engine.asked) == 6
    calls = len(place.engine.calls)
    place.evaluate()
    assert len(place.engine.calls) == calls, "all of it is kept"


def test_a_divergence_needs_a_model(place: Place) -> None:
    place.change(kl_reference="gpt2-xl")
    with pytest.raises(
        SettingsError, match=r"^evaluation\.kl_reference: 'gpt2-xl' is not a policy of task pep8"
    ):
        place.evaluate()
