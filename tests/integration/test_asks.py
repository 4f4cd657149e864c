"""Every kind of question to a judge, in the loop: real assets and store, a judge over HTTP, a toy sampler."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from click.testing import CliRunner

pytest.importorskip("openai", reason="needs the extra `judges`")

from assets import best_of_n as best_of_n_asset
from resources.store import Artifact, ArtifactStore
from resources.views import connect
from tests.integration.toy_location import defs
from tests.resources.judges.rule_endpoint import RuleEndpoint, judged_by
from textalign_dagster.cli.main import main
from textalign_dagster.ids import content_hash
from textalign_dagster.loop.abandoned import RETRY_TAG
from textalign_dagster.loop.partitions import Cell
from textalign_dagster.settings import write_yaml

pytestmark = pytest.mark.usefixtures("quick")

# The grid is read at import time, so the toys use the names of shipped experiments.
REWARD, TEXT = "pep8_alt_rm", "pep8_alt_lmu"
SAMPLES, PROMPTS = 4, 5
UNANSWERED = "def f4():"  # the prompt without a reference


def settings(judge: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    limits = {"attempts": 1, "concurrency": 4}
    judge_settings = (
        {"model": "toy", "api_key_env": None, "limits": limits, **judge} if judge is not None else None
    )
    return {
        "task": "pep8",
        "policy": {"model": "pep8-sloppy-1m"},
        "iterations": 1,
        "method": {"name": "alt_rm", "phrases": ["good", "bad"], "template": "# {condition}\n{prompt}"},
        "prompts": {"path": "prompts.jsonl", "per_iteration": PROMPTS},
        "sampling": {"samples_per_prompt": SAMPLES, "max_new_tokens": 16},
        "training": {"max_length": 256},
        "judge": judge_settings,
        **more,
    }


class Loop:
    """A home whose experiments are judged by one endpoint."""

    def __init__(self, folder: Path, endpoint: RuleEndpoint) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.store = ArtifactStore(folder / "home" / "store")
        (folder / "experiments").mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"def f{n}():", "reference": f"\n    return {n}"} for n in range(PROMPTS)]
        rows[4]["reference"] = None  # type: ignore[assignment]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "experiments" / "prompts.jsonl").write_text(lines)

    def configure(self, judge: dict[str, Any] | None, name: str = REWARD, **more: Any) -> None:
        judge_settings = {"base_url": self.endpoint.url, **judge} if judge is not None else None
        (self.folder / "experiments" / f"{name}.yaml").write_text(
            write_yaml(settings(judge_settings, **more))
        )

    def run(self, name: str = REWARD, retry_failed: bool = False) -> dict[str, Any]:
        """Runs prompts, samples and feedback; returns the feedback's metadata and checks, or ``failed`` with the reason."""
        tags = {RETRY_TAG: datetime.now(UTC).isoformat()} if retry_failed else {}
        job = defs.resolve_implicit_global_asset_job_def()
        with dg.DagsterInstance.ephemeral() as instance:
            done = job.execute_in_process(
                partition_key=Cell(name, 1).key,
                asset_selection=[dg.AssetKey(s) for s in ("prompt_draws", "generations", "feedback")],
                instance=instance,
                raise_on_error=False,
                tags=tags,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
            failures = [e.step_failure_data.user_failure_data for e in done.get_step_failure_events()]
            if any(failures):
                return {"failed": failures[0].description}
            (materialization,) = done.asset_materializations_for_node("feedback")
            checks = {
                c.check_name: c
                for c in done.get_asset_check_evaluations()
                if c.asset_key.path == ["feedback"]
            }
        return {name: value.value for name, value in materialization.metadata.items()} | {"checks": checks}

    def artifact(self, name: str = REWARD, stage: str = "feedback") -> Artifact:
        pointer = self.store.pointer(name, 1, stage)
        assert pointer is not None
        return pointer.artifact

    def rows(self, name: str = REWARD) -> pl.DataFrame:
        """Feedback with the samples' prompts and texts, in the samples' order."""
        samples = self.artifact(name, "generations").frame("generations")
        rows = self.artifact(name).frame("feedback")
        assert rows["sample_id"].to_list() == samples["sample_id"].to_list(), "one row per sample, in order"
        return rows.join(
            samples.select("sample_id", "prompt", shown="text"), on="sample_id", maintain_order="left"
        )

    def textalign(self, *arguments: str) -> str:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        return done.stdout


@pytest.fixture
def loop(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setenv("TEXTALIGN_EXPERIMENTS", str(tmp_path / "experiments"))
    with judged_by(by_quality) as endpoint:
        yield Loop(tmp_path, endpoint)


def quality(text: str) -> int:
    """The toy judge's score of a text."""
    return int(sha256(text.strip().encode()).hexdigest(), 16) % 1000


def by_quality(shown: dict[str, str], before: int) -> Any:
    """Compares by `quality`; if the difference is small, the response shown first wins."""
    first, second = (quality(shown[f"RESPONSE {place}"]) for place in "AB")
    return {"analysis": "Looked.", "better": "a" if first - second > -200 else "b"}


def expected_winner(a: str, b: str) -> str:
    gap = quality(a) - quality(b)
    return "tie" if abs(gap) < 200 else "a" if gap > 0 else "b"


RANKING = {
    "ask": "ranking",
    "template": "ranking",
    "prices": {"input": 1.0, "output": 2.0, "as_of": "2026-01-01"},
}


def test_ranking(loop: Loop) -> None:
    loop.configure(RANKING)
    forecast = json.loads(loop.textalign("forecast", REWARD, "--json"))
    metadata = loop.run()
    rows, pairs = loop.rows(), loop.artifact().frame("pairs")
    all_pairs = PROMPTS * SAMPLES * (SAMPLES - 1) // 2
    assert pairs.height == all_pairs and forecast["calls"] == 2 * all_pairs
    assert set(loop.endpoint.asked.values()) == {1}, "a comparison was paid for twice"
    shown = Counter((s["RESPONSE A"], s["RESPONSE B"]) for s in loop.endpoint.shown())
    assert all(shown[b, a] == 1 for a, b in shown), "not every pair was shown in both orders"

    # The verdicts that do not depend on the order follow from the texts alone.
    text = dict(rows.select("sample_id", "shown").iter_rows())
    points: dict[str, list[float]] = {sample_id: [] for sample_id in text}
    for pair in pairs.iter_rows(named=True):
        a, b = pair["sample_a"], pair["sample_b"]
        winner = expected_winner(text[a], text[b])
        assert (pair["winner"], pair["status"]) == (winner, "ok")
        assert pair["favoured"] == ("first" if winner == "tie" else None)
        points[a].append({"a": 1.0, "tie": 0.5, "b": 0.0}[winner])
        points[b].append({"a": 0.0, "tie": 0.5, "b": 1.0}[winner])
    assert len({*pairs["winner"]}) == 3, "choose texts that give all three verdicts"
    for row in rows.iter_rows(named=True):
        own = points[row["sample_id"]]
        assert (row["kind"], row["aspect"], row["status"]) == ("ranking", "ranking", "ok")
        assert row["value"] == pytest.approx(sum(own) / (SAMPLES - 1)) and len(row["call_keys"]) == 2 * (
            SAMPLES - 1
        )

    ties = (pairs["winner"] == "tie").sum() / pairs.height
    assert metadata["pairs"] == all_pairs and metadata["pairs tied"] == pytest.approx(ties, abs=1e-3)
    assert metadata["position bias"] == metadata["pairs tied"] and metadata["calls"] == 2 * all_pairs
    assert metadata["usd"] == pytest.approx(2 * all_pairs * 140e-6, rel=1e-3)
    with connect(loop.store) as database:
        tied_pairs = database.execute(
            "select count(*) from pairs where experiment = ? and winner = 'tie'", [REWARD]
        )
        assert tied_pairs.fetchall() == [((pairs["winner"] == "tie").sum(),)]
        keys = "select order_shown from feedback_calls where call_key = ?"
        orders = [database.execute(keys, [key]).fetchall() for key in pairs["call_keys"][0]]
    a, b = pairs["sample_a"][0], pairs["sample_b"][0]
    assert orders == [[(f"{a}, {b}",)], [(f"{b}, {a}",)]]

    exported = loop.folder / "pairs.csv"
    loop.textalign("export", REWARD, str(exported), "-k", "1", "--format", "sparse_rankings")
    assert len(exported.read_text().splitlines()) >= all_pairs


def test_position_biased_judge_finds_only_ties(loop: Loop) -> None:
    loop.endpoint.rule = lambda shown, before: {"analysis": "Second!", "better": "b"}
    loop.configure(RANKING)
    metadata = loop.run()
    pairs = loop.artifact().frame("pairs")
    assert set(pairs["winner"]) == {"tie"} and set(pairs["favoured"]) == {"second"}
    assert set(loop.rows()["value"]) == {0.5} and metadata["position bias"] == metadata["pairs tied"] == 1.0


def test_drawing_a_subset_of_pairs(loop: Loop) -> None:
    loop.configure(RANKING | {"pairs": 3})
    assert json.loads(loop.textalign("forecast", REWARD, "--json"))["calls"] == 2 * 3 * PROMPTS
    loop.run()
    pairs = loop.artifact().frame("pairs")
    assert pairs.height == 3 * PROMPTS and sum(loop.endpoint.asked.values()) == 2 * 3 * PROMPTS
    times = Counter([*pairs["sample_a"], *pairs["sample_b"]])
    assert set(times.values()) <= {1, 2} and len(times) == SAMPLES * PROMPTS
    # All pairs: those already compared are cached.
    loop.configure(RANKING)
    forecast = json.loads(loop.textalign("forecast", REWARD, "--json"))
    assert (forecast["calls"], forecast["cached"]) == (2 * 3 * PROMPTS, 2 * 3 * PROMPTS)
    loop.run()
    assert set(loop.endpoint.asked.values()) == {1}


def test_failed_comparisons_are_retried_on_request(loop: Loop) -> None:
    loop.endpoint.down = lambda shown: quality(shown["RESPONSE A"]) % 3 == 0
    loop.configure(RANKING)
    metadata = loop.run()
    answered = dict(loop.endpoint.asked)
    calls = PROMPTS * SAMPLES * (SAMPLES - 1)
    assert 0 < len(answered) < calls
    assert metadata["checks"]["judge_model"].passed and "toy" in str(
        metadata["checks"]["judge_model"].description
    )
    assert not metadata["checks"]["usable"].passed and "failed" in str(
        metadata["checks"]["usable"].description
    )
    pairs = loop.artifact().frame("pairs")
    assert set(pairs["status"]) == {"ok", "failed"}
    assert pairs.filter(pl.col("status") == "failed")["winner"].null_count() == metadata["pairs unusable"]
    forecast = json.loads(loop.textalign("forecast", REWARD, "--json"))
    assert (forecast["cached"], forecast["failed"]) == (len(answered), calls - len(answered))

    loop.endpoint.down = lambda shown: False
    assert not loop.run()["checks"]["usable"].passed  # unless requested, nothing is sent again
    metadata = loop.run(retry_failed=True)
    assert metadata["checks"]["usable"].passed
    with connect(loop.store) as database:
        probes = database.execute("select count(*) from feedback_calls where purpose = 'probe'").fetchall()
    assert len(loop.endpoint.asked) == calls and sum(loop.endpoint.asked.values()) <= calls + probes[0][0]
    assert metadata["calls"] == calls - len(answered) and metadata["calls from the ledger"] == len(answered)
    assert set(loop.artifact().frame("pairs")["status"]) == {"ok"}


def test_win(loop: Loop) -> None:
    def rule(shown: dict[str, str], before: int) -> Any:
        answers = {place: shown[f"RESPONSE {place}"] for place in "AB"}
        return {"analysis": ".", "better": max("AB", key=lambda place: quality(answers[place])).lower()}

    loop.endpoint.rule = rule
    loop.configure({"ask": "win", "template": "win"})
    expected = json.loads(loop.textalign("forecast", REWARD, "--json"))["calls"]
    loop.run()
    assert sum(loop.endpoint.asked.values()) == expected == 2 * (PROMPTS - 1) * SAMPLES
    rows = loop.rows()
    skipped = rows.filter(prompt=UNANSWERED)
    assert skipped.select("status", "reason", "value").unique().rows() == [
        ("skipped", "its prompt has no reference", None)
    ]
    for row in rows.filter(pl.col("prompt") != UNANSWERED).iter_rows(named=True):
        reference = f"\n    return {row['prompt'][5]}"
        won = quality(row["shown"]) > quality(reference)
        assert (row["value"], row["label"]) == ((1.0, "win") if won else (0.0, "loss"))
    assert loop.artifact().frame("pairs").height == (PROMPTS - 1) * SAMPLES
    for suffix in ("csv", "jsonl"):  # both formats contain the references
        form = {"csv": "sparse_rankings", "jsonl": "plain"}[suffix]
        path = loop.folder / f"wins.{suffix}"
        loop.textalign("export", REWARD, str(path), "-k", "1", "--format", form)
        assert "return 0" in path.read_text()


def spoiled(text: str) -> bool:
    return quality(text) % 5 == 0


def rate(shown: dict[str, str], before: int) -> Any:
    """Returns one rating, or one for each response of a group; some are invalid."""
    numbered = {
        name.removeprefix("RESPONSE "): t for name, t in shown.items() if name.startswith("RESPONSE ")
    }

    def entry(text: str) -> Any:
        return {"analysis": ".", "rating": 99 if spoiled(text) else 1 + quality(text) % 7}

    return {n: entry(t) for n, t in numbered.items()} if numbered else entry(shown["RESPONSE"])


def test_group_with_an_invalid_item(loop: Loop) -> None:
    loop.endpoint.rule = rate
    lenient = {"max_unusable_feedback": 1.0}
    loop.configure({"ask": "rating", "template": "rating", "group": 3}, checks=lenient)
    assert json.loads(loop.textalign("forecast", REWARD, "--json"))["calls"] == 2 * PROMPTS  # 3 + 1 of 4
    loop.run()
    assert sum(loop.endpoint.asked.values()) == 2 * PROMPTS
    rows = loop.rows()
    assert set(rows["status"]) == {"ok", "unparseable"}, "choose samples some of which are spoiled"
    for text, status, value in rows.select("shown", "status", "value").iter_rows():
        bad = spoiled(text)
        assert (status, value) == (("unparseable", None) if bad else ("ok", 1 + quality(text) % 7))
    shared = rows.group_by("prompt").agg(pl.col("call_keys").list.first())["call_keys"]
    assert [sorted(Counter(keys).values()) for keys in shared] == [[1, 3]] * PROMPTS


def test_group_with_an_unparseable_reply(loop: Loop) -> None:
    loop.endpoint.rule = lambda shown, before: (
        "no idea" if shown["PROMPT"] == UNANSWERED else rate(shown, before)
    )
    loop.configure(
        {"ask": "rating", "template": "rating", "group": SAMPLES}, checks={"max_unusable_feedback": 1.0}
    )
    loop.run()
    assert sum(loop.endpoint.asked.values()) == PROMPTS, "nothing was asked again"
    rows = loop.rows().filter(prompt=UNANSWERED)
    assert set(rows["status"]) == {"unparseable"} and rows["value"].null_count() == SAMPLES


def test_repeats_are_averaged(loop: Loop) -> None:
    loop.endpoint.rule = lambda shown, before: {"analysis": ".", "rating": (2, 3, 7)[before]}
    loop.configure({"ask": "rating", "template": "rating", "repeats": 3})
    assert json.loads(loop.textalign("forecast", REWARD, "--json"))["calls"] == 3 * PROMPTS * SAMPLES
    loop.run()
    assert set(loop.endpoint.asked.values()) == {3}
    rows = loop.rows()
    assert set(rows["value"]) == {4.0} and set(rows["call_keys"].list.n_unique()) == {3}
    repeats = loop.artifact(REWARD).frame("feedback_repeats").sort("sample_id", "value")
    assert repeats["value"].to_list() == [2.0, 3.0, 7.0] * PROMPTS * SAMPLES
    assert set(repeats["call_key"]) == set(rows["call_keys"].explode())
    # One more repeat is one more call per sample; the first three are cached.
    loop.endpoint.rule = lambda shown, before: {"analysis": ".", "rating": 4}
    loop.configure({"ask": "rating", "template": "rating", "repeats": 4})
    loop.run()
    assert set(loop.endpoint.asked.values()) == {4} and set(loop.rows()["value"]) == {4.0}


def test_custom_scale(loop: Loop) -> None:
    loop.endpoint.rule = lambda shown, before: {"analysis": ".", "rating": 90}
    loop.configure({"ask": "rating", "template": "rating", "scale": {"low": 0, "high": 100}})
    loop.run()
    assert set(loop.rows()["value"]) == {90.0}
    (instructions,) = {messages[0]["content"] for messages in loop.endpoint.questions}
    assert "from 0 to 100" in instructions and "from 1 to 7" not in instructions


def test_text_feedback_by_group(loop: Loop) -> None:
    def rule(shown: dict[str, str], before: int) -> Any:
        reply = {"analysis": ".", "feedback": "Reads well.", "score": 2}
        return {name.split()[1]: reply for name in shown if name.startswith("RESPONSE")}

    loop.endpoint.rule = rule
    method = {"name": "alt_lmu", "ask_for": "Reads well."}
    loop.configure({"template": "text_feedback", "group": 2}, TEXT, method=method)
    loop.run(TEXT)
    rows = loop.rows(TEXT)
    assert rows.select("kind", "value", "text", "status").unique().rows() == [
        ("text", 2.0, "Reads well.", "ok")
    ]
    assert sum(loop.endpoint.asked.values()) == PROMPTS * 2


def test_consistency_of_ratings_and_rankings(loop: Loop) -> None:
    loop.endpoint.rule = lambda shown, before: (
        by_quality(shown, before)
        if "RESPONSE A" in shown
        else {"analysis": ".", "rating": 1 + quality(shown["RESPONSE"]) // 143}
    )
    loop.configure({"ask": "rating", "template": "rating", "repeats": 2}, TEXT)
    loop.configure(RANKING)
    for name in (TEXT, REWARD):
        loop.run(name)
    report = json.loads(loop.textalign("consistency", TEXT, REWARD, "-k", "1", "--json"))
    assert report["rating_repeats"]["agreement"]["value"] == 1.0, "the endpoint gives the same rating twice"
    pairs = PROMPTS * SAMPLES * (SAMPLES - 1) // 2
    assert report["coverage"] == {"pairs": pairs, "ranked": pairs, "rated": pairs, "both": pairs}
    texts = loop.rows().select("prompt", "shown").rows()
    same = 0
    for (p, a), (q, b) in combinations(texts, 2):
        rating = {True: "a", False: "b"}[quality(a) // 143 > quality(b) // 143]
        rated = "tie" if quality(a) // 143 == quality(b) // 143 else rating
        same += p == q and rated == expected_winner(a, b)
    assert report["agreement"]["agreement"]["value"] == pytest.approx(same / pairs)
    refused = CliRunner().invoke(main, ["consistency", REWARD, TEXT, "-k", "1"])
    assert refused.exit_code == 1 and "compared no samples" in refused.stderr


def test_reward_model_evaluation_reports_judge_consistency(loop: Loop) -> None:
    """The second rating is the same for all texts, so it agrees with half of what the first one decides."""
    loop.endpoint.rule = lambda shown, before: {
        "analysis": ".",
        "rating": 4 if before else 1 + quality(shown["RESPONSE"]) // 143,
    }
    loop.configure(
        # One call at a time: the endpoint recognises a second call by the questions it has answered.
        {"ask": "rating", "template": "rating", "repeats": 2, "limits": {"attempts": 1, "concurrency": 1}},
        method={"name": "rm_ratings", "scale": [1, 7]},
        datapool={"shares": None, "samples": None, "drop_factor": 1.0},
        evaluation={"prompts": 4, "samples_per_prompt": 3},
        control=None,
        training={"max_length": 256, "epochs": 1, "objective": {"name": "rating"}},
    )
    assert "consistency" in loop.textalign("run", REWARD)
    scores = loop.artifact(REWARD, "evaluation").frame("scores")
    assert scores.filter(metric="judge_consistency")["value"].to_list() == [0.5]


def test_best_of_n_by_a_judge(loop: Loop) -> None:
    """One judge ranks the candidates, another rates the chosen ones; training uses the task's own feedback."""
    loop.endpoint.rule = lambda shown, before: (
        by_quality(shown, before)
        if "RESPONSE A" in shown
        else {"analysis": ".", "rating": 1 + quality(shown["RESPONSE"]) // 143}
    )
    limits = {"attempts": 1, "concurrency": 4}
    endpoint = {"model": "toy", "api_key_env": None, "base_url": loop.endpoint.url, "limits": limits}
    ranking = {**endpoint, "ask": "ranking", "template": "ranking"}
    rating = {**endpoint, "ask": "rating", "template": "rating"}
    best_of_n = {"n": [1, 4], "judge": ranking}
    loop.configure(
        None,
        method={"name": "sft"},
        datapool={"shares": None, "samples": None, "drop_factor": 1.0},
        evaluation={"prompts": 4, "samples_per_prompt": 1, "best_of_n": best_of_n, "judge": rating},
        control=None,
    )
    loop.textalign("run", REWARD)
    pointer = loop.store.pointer(REWARD, 0, "evaluation")
    assert pointer is not None
    artifact = pointer.artifact
    candidates, samples = artifact.frame("candidates"), artifact.frame("evaluation_samples")
    fours = [
        content_hash(best_of_n_asset.NAME, 4, candidate_id) for candidate_id in candidates["candidate_id"]
    ]
    chosen = samples.filter(pl.col("sample_id").is_in(fours))
    assert candidates.height == 16 and chosen.height == 4
    for prompt, texts in candidates.group_by("prompt_id").agg("text", "score").drop("score").iter_rows():
        points = {
            a: sum({"a": 1.0, "tie": 0.5, "b": 0.0}[expected_winner(a, b)] for b in texts if b is not a)
            for a in texts
        }
        assert points[chosen.filter(prompt_id=prompt)["text"][0]] == max(points.values())
    # Both judges are recorded: 4 · 6 pairs in both orders, and the ratings of 4 + 4 + 16 samples.
    facts = artifact.manifest["facts"]
    judgements = artifact.frame("judgements")
    assert set(judgements["kind"]) == {"ranking", "rating"} and judgements.height == 16 + 4 + 16 + 4
    assert facts["calls"] == sum(loop.endpoint.asked.values()) - _calls_in(loop, 1)


def _calls_in(loop: Loop, iteration: int) -> int:
    """Judge calls of an iteration's evaluation."""
    return int(loop.artifact(REWARD, "evaluation").manifest["facts"]["calls"])


def test_a_scorer_instead_of_a_judge(loop: Loop) -> None:
    scorer = {"name": "patterns", "patterns": [r"print\("]}
    loop.configure(None, scorer=scorer)
    loop.run()
    rows = loop.rows()
    assert set(rows["aspect"]) == {"patterns"} and set(rows["kind"]) == {"reward"}
    assert "pairs" not in loop.artifact().tables and loop.endpoint.asked.total() == 0
    clean = rows.filter(~pl.col("shown").str.contains("print(", literal=True))
    assert 0 < clean.height < rows.height and set(clean["value"]) == {rows["value"].max()}


@pytest.mark.parametrize(
    ("judge", "more", "words"),
    [
        (RANKING | {"pairs": 1}, {}, "judge.pairs: 1 pairs leave out some of the 4 samples"),
        (
            RANKING,
            {"sampling": {"samples_per_prompt": 1, "max_new_tokens": 16}},
            "raise sampling.samples_per_prompt",
        ),
        (
            {"ask": "win", "template": "win"},
            {"prompts": {"per_iteration": 5}},
            "the prompts have none; give a file",
        ),
        (
            {"ask": "rating", "template": "win"},
            {},
            "judge.ask: 'rating', but the template win asks for 'win'",
        ),
    ],
)
def test_impossible_settings_are_rejected_before_sampling(
    loop: Loop, judge: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    loop.configure(judge, **more)
    refused = CliRunner().invoke(main, ["validate", REWARD])
    assert refused.exit_code == 1 and words in refused.stderr and f"{REWARD}.yaml" in refused.stderr


def test_settings_that_affect_verdicts_change_the_key(loop: Loop) -> None:
    loop.endpoint.rule = rate
    base = {"ask": "rating", "template": "rating"}
    keys = set()
    lenient = {"max_unusable_feedback": 1.0}
    for more in (
        {},
        {"group": 2},
        {"repeats": 2},
        {"scale": {"low": 1, "high": 9}},
        {"limits": {"concurrency": 2}},
    ):
        loop.configure(base | more, checks=lenient)
        assert "failed" not in loop.run()
        keys.add(loop.artifact().key)
    assert len(keys) == 4, "only the limits leave the key unchanged"


def test_a_judge_ranks_the_responses_of_a_file(loop: Loop) -> None:
    """Offline, with labels from a judge: nothing is sampled, and the file's own labels are ignored."""
    rows = [
        {"prompt": f"def f{n}():", "chosen": f"\n    return {n}", "rejected": f"\n    return {n + 1}"}
        for n in range(PROMPTS)
    ]
    path = loop.folder / "experiments" / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop.configure({"template": "ranking", "ask": "ranking"}, prompts={}, offline={"path": "pairs.jsonl"})
    metadata = loop.run()
    assert "failed" not in metadata, metadata
    samples = loop.artifact(stage="generations").frame("generations")
    assert set(samples["engine"]) == {"file"} and samples["logprob"].null_count() == 2 * PROMPTS
    pairs = loop.artifact().frame("pairs")
    texts = dict(samples.select("sample_id", "text").iter_rows())
    assert pairs.height == PROMPTS and sum(loop.endpoint.asked.values()) == 2 * PROMPTS
    for a, b, winner in pairs.select("sample_a", "sample_b", "winner").iter_rows():
        assert winner == expected_winner(texts[a], texts[b])


def test_without_a_judge_the_files_labels_are_used(loop: Loop) -> None:
    path = loop.folder / "experiments" / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "def f():", "chosen": "\n    a = 1", "rejected": "\n    b"}))
    loop.configure(None, prompts={}, offline={"path": "pairs.jsonl"})
    assert "failed" not in loop.run()
    rows = loop.rows()
    assert dict(rows.select("shown", "value").iter_rows()) == {"\n    a = 1": 1.0, "\n    b": 0.0}
    assert set(rows["scorer"]) == {"imported from pairs.jsonl"} and not loop.endpoint.asked
    # New content at the same path gives new samples and feedback.
    path.write_text(json.dumps({"prompt": "def f():", "chosen": "\n    b", "rejected": "\n    a = 1"}))
    assert "failed" not in loop.run()
    assert dict(loop.rows().select("shown", "value").iter_rows()) == {"\n    a = 1": 0.0, "\n    b": 1.0}
