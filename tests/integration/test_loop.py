"""The whole loop through the command line: real policy, real sampler, real trainer."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import polars as pl
import pytest

from resources.freshness import Freshness
from tests.integration.conftest import Place, Ran
from tests.toy import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.ids import derive_seed
from textalign_dagster.loop.stages import STAGES
from textalign_dagster.settings import merge, parse_yaml, write_yaml
from textalign_dagster.tables import (
    CHECKPOINTS,
    DATAPOOL,
    EVALUATION_SAMPLES,
    FEEDBACK,
    GENERATIONS,
    PROMPT_DRAWS,
    SCORES,
)

TABLES = {
    "prompt_draws": ("prompt_draws", PROMPT_DRAWS),
    "generations": ("generations", GENERATIONS),
    "feedback": ("feedback", FEEDBACK),
    "datapool": ("datapool", DATAPOOL),
    "checkpoint": ("checkpoints", CHECKPOINTS),
    "evaluation": ("scores", SCORES),
}


def library(place: Place) -> Library:
    return Library((place.experiments, PROJECT / "experiments", place.home / "variants"))


def states(place: Place, name: str) -> dict[tuple[int, str], str]:
    """(iteration, stage) → state."""
    cells = json.loads(place.textalign("status", name, "--json").stdout)
    return {(cell["iteration"], cell["stage"]): cell["state"] for cell in cells}


def stage_lines(output: str) -> dict[str, list[str]]:
    """``toy|001`` → the stages that were computed (not reused)."""
    computed: dict[str, list[str]] = {}
    for cell, stage, took in re.findall(r"^(\S+\|\d{3}) +(\w+) +(reused|[\d.]+ s) ", output, re.MULTILINE):
        if took != "reused":
            computed.setdefault(cell, []).append(stage)
    return computed


@pytest.mark.parametrize("name", ["toy", "toy_null"])
def test_every_stage_has_its_table(ran: Ran, name: str) -> None:
    for k in (1, 2):
        for stage, (table, schema) in TABLES.items():
            frame = ran.frame(name, k, stage, table)
            assert frame.schema == schema, f"{table} of {name}, iteration {k}"
            assert frame.height, f"{table} of {name}, iteration {k}"
    assert ran.frame(name, 0, "evaluation", "evaluation_samples").schema == EVALUATION_SAMPLES
    for stage in STAGES[:-1]:
        assert ran.store.pointer(name, 0, stage) is None


def test_counts(ran: Ran) -> None:
    for k in (1, 2):
        assert ran.frame("toy", k, "prompt_draws").height == 4
        generations = ran.frame("toy", k, "generations")
        assert generations.height == 4 * 3
        assert (generations["n_tokens"] == 8).all()  # ignore_eos
        feedback = ran.frame("toy", k, "feedback")
        assert feedback.height == 12
        assert (feedback["status"] == "ok").all()
        pool = ran.frame("toy", k, "datapool")
        assert pool.height == 12 * k  # drop_factor 0 keeps earlier iterations
        assert pool["drawn"].sum() == 8
        assert sorted(pool["origin"].unique()) == list(range(1, k + 1))
        row = ran.frame("toy", k, "checkpoint", "checkpoints").row(0, named=True)
        assert (row["rows"], row["steps"]) == (8, 4)
        samples = ran.frame("toy", k, "evaluation", "evaluation_samples")
        assert dict(samples.group_by("role").len().rows()) == {"main": 6, "probe": 3 * 6}


def test_conditions(ran: Ran) -> None:
    assert ran.frame("toy", 1, "generations")["condition"].null_count() == 12
    assert set(ran.frame("toy", 2, "generations")["condition"]) == {"no issues"}
    for k in (1, 2):
        assert ran.frame("toy_null", k, "generations")["condition"].null_count() == 12
        pool = ran.frame("toy", k, "datapool").filter("drawn")
        feedback = pl.concat(ran.frame("toy", i, "feedback") for i in range(1, k + 1))
        joined = pool.join(feedback, on="sample_id")
        assert (joined["condition"] == joined["text"]).all()  # its own feedback, word for word
        assert ran.frame("toy_null", k, "datapool")["condition"].null_count() == 12 * k
        assert set(ran.frame("toy_null", k, "feedback")["status"]) == {"skipped"}


def test_seeds_are_derived_and_stored(ran: Ran) -> None:
    for k in (1, 2):
        draws = ran.frame("toy", k, "prompt_draws")
        for draw in draws.iter_rows(named=True):
            assert draw["seed"] == derive_seed(0, "draw", k, draw["prompt_id"], draw["draw_index"])
        samples = ran.frame("toy", k, "generations").join(draws.select("draw_id", root="seed"), on="draw_id")
        for sample in samples.iter_rows(named=True):
            assert sample["seed"] == derive_seed(sample["root"], "sample", sample["sample_index"])
        row = ran.frame("toy", k, "checkpoint", "checkpoints").row(0, named=True)
        assert row["seed"] == derive_seed(0, "training", k) % 2**32
    seeds = [s for k in (1, 2) for s in ran.frame("toy", k, "generations")["seed"]]
    assert len(set(seeds)) == 24


def test_ids_are_unique_across_iterations_and_methods(ran: Ran) -> None:
    tables = [ran.frame("toy", k, "generations") for k in (1, 2)] + [ran.frame("toy_null", 2, "generations")]
    ids = pl.concat(tables)["sample_id"]
    assert ids.n_unique() == len(ids)


def test_the_loop_is_closed(ran: Ran) -> None:
    """Iteration 2 samples from the policy that iteration 1 trained from the base."""
    first, second = (ran.frame("toy", k, "checkpoint", "checkpoints").row(0, named=True) for k in (1, 2))
    base = ran.frame("toy", 1, "generations")["policy_hash"].unique().to_list()
    assert [first["parent"]] == base
    assert second["parent"] == first["policy_hash"]
    assert ran.frame("toy", 2, "generations")["policy_hash"].unique().to_list() == [first["policy_hash"]]
    assert len({*base, first["policy_hash"], second["policy_hash"]}) == 3
    assert ran.frame("toy", 0, "evaluation", "scores")["policy_hash"].unique().to_list() == base
    for k, row in ((1, first), (2, second)):
        assert set(ran.frame("toy", k, "evaluation", "scores")["policy_hash"]) == {row["policy_hash"]}
        assert row["pool_hash"] == ran.frame("toy", k, "datapool")["pool_hash"][0]
        model = ran.artifact("toy", k, "checkpoint").path("model")
        assert (model / "model.safetensors").is_file()
        assert not list(model.glob("*.bin")) + list(model.glob("*.p*t"))


def test_scores_have_intervals_and_include_the_base_policy(ran: Ran) -> None:
    for k in (0, 1, 2):
        scores = ran.frame("toy", k, "evaluation", "scores").filter(role="main")
        assert {"violations", "clean", "perplexity", "n_tokens"} <= set(scores["metric"])
        assert (scores["lo"] <= scores["value"] + 1e-12).all()
        assert (scores["value"] <= scores["hi"] + 1e-12).all()
        assert scores["condition"].unique().to_list() == ([None] if k == 0 else ["no issues"])
    assert "iteration 0 (base policy)" in ran.output
    assert "null control, iteration 2" in ran.output
    assert (ran.home / "plots" / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_feedback_export_and_import_round_trip(ran: Ran, tmp_path: Path) -> None:
    out, back = tmp_path / "feedback.jsonl", tmp_path / "feedback.parquet"
    ran.textalign("export", "toy", str(out), "--iteration", "1", "--format", "alt")
    summary = ran.textalign("import", str(out), str(back), "--format", "alt").stdout
    ours = ran.frame("toy", 1, "generations").join(
        ran.frame("toy", 1, "feedback"), on="sample_id", suffix="_said"
    )
    assert f"{ours.height} ok; refused: 0" in summary
    imported = pl.read_parquet(back)
    key = ["prompt", "response", "feedback", "value"]
    expected = ours.select("prompt", response="text", feedback="text_said", value="value")
    assert imported.select(key).sort(key).equals(expected.select(key).sort(key))
    ran.textalign("export", "toy", str(out), "--iteration", "9", ok=False)


def test_null_control_shares_upstream_artifacts(ran: Ran) -> None:
    for stage in ("prompt_draws", "generations"):
        assert ran.artifact("toy", 1, stage).key == ran.artifact("toy_null", 1, stage).key
    assert ran.artifact("toy", 2, "prompt_draws").key == ran.artifact("toy_null", 2, "prompt_draws").key
    assert ran.artifact("toy", 0, "evaluation").key == ran.artifact("toy_null", 0, "evaluation").key
    for stage in ("feedback", "datapool", "checkpoint", "evaluation"):
        assert ran.artifact("toy", 1, stage).key != ran.artifact("toy_null", 1, stage).key
    assert "toy_null|001 " in ran.output
    assert "prompt_draws" not in stage_lines(ran.output)["toy_null|001"]
    assert "generations" not in stage_lines(ran.output)["toy_null|001"]


def test_nothing_but_results_is_printed(ran: Ran) -> None:
    for noise in ("Warning", "warning", "DEBUG", "dagster"):
        assert noise not in ran.output


def test_second_run_reuses_everything_and_reports_it(ran: Ran, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    before = {path: path.stat().st_mtime_ns for path in (place.home / "store").rglob("*") if path.is_file()}
    started = time.monotonic()
    output = place.textalign("run", "toy").stdout
    assert time.monotonic() - started < max(10.0, ran.seconds / 2)
    for cell in ("toy|001", "toy|002", "toy_null|001", "toy_null|002"):
        assert f"{cell}  up to date" in output
    assert "iteration 2" in output
    after = {path: path.stat().st_mtime_ns for path in (place.home / "store").rglob("*") if path.is_file()}
    assert after == before


def test_tables_can_be_queried_in_sql(ran: Ran) -> None:
    query = (
        "select iteration, label, count(*) as n from datapool "
        "where experiment = 'toy' and drawn group by all order by all"
    )
    rows = json.loads(ran.textalign("sql", query, "--json").stdout)
    assert sum(row["n"] for row in rows if row["iteration"] == 1) == 8
    assert sum(row["n"] for row in rows if row["iteration"] == 2) == 8
    assert all(row["label"] in "3210" for row in rows)
    assert "label" in ran.textalign("sql", query).stdout


def test_show_and_status_as_json(ran: Ran) -> None:
    rows = json.loads(ran.textalign("show", "toy", "--json").stdout)
    assert {(row["experiment"], row["iteration"]) for row in rows} == {
        ("toy", 0), ("toy", 1), ("toy", 2), ("toy_null", 1), ("toy_null", 2)
    }  # fmt: skip
    assert set(states(ran, "toy").values()) == {"fresh"}


def test_timing_lists_every_part_and_the_longest(ran: Ran) -> None:
    rows = json.loads(ran.textalign("timing", "toy", "--json").stdout)
    parts: dict[str, set[str]] = {}
    for row in rows:
        parts.setdefault(row["stage"], set()).add(row["part"])
    assert list(parts) == ["evaluation", *STAGES[:5]]  # iteration 0 has only an evaluation
    assert parts["evaluation"] == {"sampling", "fluency", "scoring", "judging", "measuring", "rest"}
    for name, k in (("toy", 1), ("toy", 2)):
        for stage in STAGES[:5]:
            took = sum(row["seconds"] for row in rows if (row["iteration"], row["stage"]) == (k, stage))
            assert took == pytest.approx(
                ran.store.pointer(name, k, stage).artifact.manifest["seconds"], abs=0.1
            )  # type: ignore[union-attr]
    shown = ran.textalign("timing", "toy").stdout
    assert "Longest:" in shown and "iteration 2: " in shown
    control = json.loads(ran.textalign("timing", "toy_null", "--json").stdout)
    assert {row["reused"] for row in control if row["stage"] == "prompt_draws"} == {True}


def test_edit_recomputes_only_dependent_stages_and_stale_ones_are_not_built_on(
    ran: Ran, tmp_path: Path
) -> None:
    place = ran.copy(tmp_path / "place")
    path = place.experiments / "toy.yaml"
    path.write_text(path.read_text().replace("batch_size: 2\n", "batch_size: 2\n  learning_rate: 2e-3\n"))
    assert library(place).load("toy").training.learning_rate == 2e-3

    by_cell = states(place, "toy")
    assert [stage for stage in STAGES if by_cell[1, stage] == "fresh"] == list(STAGES[:4])
    assert [stage for stage in STAGES if by_cell[2, stage] == "fresh"] == ["prompt_draws"]

    done = place.textalign("run", "toy", "--iterations", "1", "--no-control")
    assert stage_lines(done.stdout) == {"toy|001": ["checkpoint", "evaluation"]}

    # Iteration 2 came from the old checkpoint: it is stale, and no stage builds on it.
    by_cell = states(place, "toy")
    assert set(by_cell[1, stage] for stage in STAGES) == {"fresh"}
    assert {stage: by_cell[2, stage] for stage in STAGES} == {
        "prompt_draws": "fresh", **dict.fromkeys(STAGES[1:], "stale")
    }  # fmt: skip
    reason = Freshness(place.store, "toy", library(place).load("toy")).state(2, "datapool").reason
    assert reason == "generations of toy, iteration 2, was computed from a policy replaced since then"
    done = place.textalign("toy|002", "feedback", program=(str(ONE_STAGE),), ok=False)
    assert "feedback of toy, iteration 2, builds on generations of iteration 2: " + reason in done.stderr
    assert "materialize that again first (`textalign run` does, in order)" in done.stderr


def test_prompts_are_drawn_by_a_query_over_the_tables(ran: Ran, tmp_path: Path) -> None:
    """The query from the docs: prompts on which the feedback varies."""
    page = (PROJECT / "docs" / "experiments.md").read_text(encoding="utf-8")
    (query,) = re.findall(r'weights: "([^"]+)"', page)
    place = ran.copy(tmp_path / "place")
    weighted = "{extends: toy, control: null, prompts: {draw: weighted, per_iteration: 1, weights: %s}}"

    def draw(query: str, **options: bool) -> str:
        (place.experiments / "weighted.yaml").write_text(weighted % json.dumps(query))
        return place.textalign("weighted|001", "prompt_draws", program=(str(ONE_STAGE),), **options).stderr

    draw(query)
    drawn = place.frame("weighted", 1, "prompt_draws")
    judged = {p for k in (1, 2) for p in ran.frame("toy", k, "generations")["prompt_id"]}
    assert set(drawn["prompt_id"]) <= judged
    assert (drawn["weight"] > 0).all()
    for bad, message in (
        ("selekt 1", "prompts.weights: the query fails: "),
        ("select 1 as x", "prompts.weights: the query gives x; it must give prompt_id, weight"),
        (
            "select prompt_id, 'a' as weight from feedback join generations using (sample_id)",
            "weight is String",
        ),
        ("select prompt_id, 1 as weight from generations", "gives a prompt_id more than once; group by it"),
        (
            "select 'a' as prompt_id, 1 as weight",
            "1 prompts requested in iteration 1, but weighted can draw 0",
        ),
    ):
        assert message in draw(bad, ok=False)


def test_samples_are_weighted_by_a_query_over_the_tables(ran: Ran, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    written = (place.experiments / "toy.yaml").read_text(encoding="utf-8")

    def pool(query: str, **options: bool) -> str:
        changed = merge(parse_yaml(written, "toy"), {"datapool": {"weights": query}})
        (place.experiments / "toy.yaml").write_text(write_yaml(changed), encoding="utf-8")
        return place.textalign("toy|001", "datapool", program=(str(ONE_STAGE),), **options).stderr

    # Samples that the query leaves out have weight 1.
    pool("select sample_id, 2 as weight from feedback where experiment = 'toy' and sample_id < '8'")
    rows = place.frame("toy", 1, "datapool")
    assert rows["weight"].to_list() == [2.0 if i < "8" else 1.0 for i in rows["sample_id"]]
    assert rows["weight"].n_unique() == 2
    weights = dict(rows.select("sample_id", "weight").iter_rows())
    examples = place.frame("toy", 1, "datapool", "examples")
    assert examples["weight"].to_list() == [weights[i] for i in examples["sample_id"]]
    for bad, message in (
        ("select 'a' as sample_id, 1 as weight", "gives none of the pool's samples a weight"),
        (
            "select sample_id, -1 as weight from generations where experiment = 'toy'",
            "finite and not negative",
        ),
    ):
        assert "datapool.weights: the query gives" in (error := pool(bad, ok=False)) and message in error


ONE_STAGE = Path(__file__).with_name("one_stage.py")
