"""Importing and exporting feedback files of other projects: nothing is changed or lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from textalign_dagster.feedback_files.formats import FORMATS, read_feedback, write_feedback
from textalign_dagster.feedback_files.imported import SAMPLES, Imported
from textalign_dagster.judging.pairs import PAIRS
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import FEEDBACK


def load(
    tmp_path: Path, format_name: str, content: str, name: str = "file.jsonl", **options: Any
) -> Imported:
    path = tmp_path / name
    path.write_bytes(content.encode())
    return read_feedback(path, format_name, **options)


def judged_rows(imported: Imported) -> list[tuple[Any, ...]]:
    joined = imported.feedback.join(
        imported.samples, on="sample_id", suffix="_sampled", maintain_order="left"
    )
    return joined.select("prompt", "text_sampled", "kind", "value", "label", "text", "status").rows()


# ALT


def test_alt_scores_and_feedback(tmp_path: Path) -> None:
    line = {
        "prompt": "P",
        "generations": ["g1", "g2", "g2", "g4", "g5"],
        "feedbacks": ["Good.", None, "Fine.", "Great.", " "],
        "analysis": ["a", None, "b", "c", "d"],
        "scores": [3, None, 2.0, 10, 1],
    }
    found = load(tmp_path, "alt", json.dumps(line) + "\n")
    assert judged_rows(found) == [
        ("P", "g1", "text", 3.0, None, "Good.", "ok"),
        ("P", "g2", "text", None, None, None, "failed"),
        ("P", "g2", "text", 2.0, None, "Fine.", "ok"),  # a separate sample
        ("P", "g4", "text", None, None, None, "unparseable"),
        ("P", "g5", "text", None, None, None, "unparseable"),
    ]
    assert found.samples["sample_id"].n_unique() == 5
    assert found.feedback["reason"].to_list()[3] == "10 is outside 0 to 3"
    assert found.samples.schema == SAMPLES and found.feedback.schema == FEEDBACK
    assert "`analysis` is not kept" in found.notes[0]
    assert found.feedback["scorer"][0] == "imported from file.jsonl"


def test_alt_categories_rewards_and_toxicity(tmp_path: Path) -> None:
    strays = {"prompt": "P", "generations": ["a", "b", "c"], "feedbacks": ["Harmful.", "Harmful-ish", None]}
    found = load(tmp_path, "alt", json.dumps(strays))
    assert found.feedback.select("label", "status").rows() == [
        ("Harmful", "ok"),
        (None, "unparseable"),
        (None, "failed"),
    ]
    rewards = '{"prompt": "P", "generations": ["a", "b", "c", "d"], "rewards": [0, -1.5, null, NaN]}'
    found = load(tmp_path, "alt", rewards)
    assert found.feedback["value"].to_list() == [0, -1.5, None, None]  # a reward of 0 is a reward
    assert found.feedback["status"].to_list() == ["ok", "ok", "failed", "unparseable"]
    toxic = {
        "prompt": {"text": "P"},
        "generations": [{"text": "a", "toxicity": 0.25}, {"text": "b", "toxicity": None}],
    }
    found = load(tmp_path, "alt", json.dumps(toxic))
    assert found.samples["prompt"].to_list() == ["P", "P"]
    assert found.feedback["value"].to_list() == [0.75, None]
    none = load(tmp_path, "alt", '{"prompt": "P", "generations": ["a"]}')
    assert none.feedback["status"].to_list() == ["skipped"]


def test_bad_alt_lines_are_refused_with_their_line_number(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "P", "generations": ["a"], "rewards": [1]}',
        "",
        "not json",
        '["a list"]',
        '{"generations": ["a"]}',
        '{"prompt": "P", "generations": "a"}',
        '{"prompt": "P", "generations": ["a", "b"], "rewards": [1]}',
        '{"prompt": "P", "generations": [1], "rewards": [1]}',
        '{"prompt": "P", "generations": ["x"], "rewards": [1], "sample_ids": ["i"]}',
        '{"prompt": "P", "generations": ["y"], "rewards": [1], "sample_ids": ["i"]}',
    ]
    found = load(tmp_path, "alt", "\n".join(lines))
    assert (found.rows, found.samples.height) == (9, 2)
    assert [(r.line, r.reason) for r in found.refused] == [
        (3, "not a JSON object"),
        (4, "not a JSON object"),
        (5, "no text in `prompt`"),
        (6, "no list in `generations`"),
        (7, "`rewards` and `generations` differ in length"),
        (8, "no text in `a generation`"),
        (10, "a sample id is repeated"),
    ]
    summary = found.summary()
    assert summary.startswith("9 rows: 2 samples; judgements: 2 ok; refused: 7\n")
    assert "refused, 2 × not a JSON object (line 3: not json; line 4:" in summary


# CUT


def test_cut_judgments(tmp_path: Path) -> None:
    records = [
        {"id": 1, "instruction": "I", "input": "", "output": "o1", "judgment": None},
        {"instruction": "I", "input": "more", "output": "o2", "judgment": "The date is wrong."},
        {"instruction": "I", "input": None, "output": "o3", "judgment": "$ERROR$"},
        {"instruction": "I", "output": "o4", "judgment": "The response is perfect, well done."},
        {"instruction": "I", "output": "o5", "judgment": "Fine but short.", "score": 7},
        {"instruction": "I", "output": "o6", "judgment": "Wrong.", "score": 2, "i_ans": "better"},
        {"instruction": "I", "output": "o7"},
        {"instruction": "I", "output": "o8", "judgment": "Perfect."},
    ]
    found = load(tmp_path, "cut", json.dumps(records, indent=1), "file.json")
    assert [(r[1], *r[3:]) for r in judged_rows(found)] == [
        ("o1", None, "perfect", None, "ok"),
        ("o2", None, "flawed", "The date is wrong.", "ok"),
        ("o3", None, None, None, "failed"),
        ("o4", None, None, None, "unparseable"),
        ("o5", 7.0, "perfect", None, "ok"),
        ("o6", 2.0, "flawed", "Wrong.", "ok"),
        ("o7", None, None, None, "skipped"),
        ("o8", None, "perfect", None, "ok"),
    ]
    assert found.samples["prompt"].to_list()[1] == "I\nmore"
    assert found.samples["reference"].to_list()[5] == "better"
    for praise in ("perfect", "flawed"):
        found = load(tmp_path, "cut", json.dumps(records[3:4]), praise=praise)
        assert found.feedback["label"].to_list() == [praise]


def test_cut_lines_and_broken_files(tmp_path: Path) -> None:
    text = '[\n {"instruction": "I", "output": "o",\n  "judgment": null},\n {"instruction": "", "output": "o"},\n 3\n]'
    found = load(tmp_path, "cut", text)
    assert [(r.line, r.reason) for r in found.refused] == [
        (4, "`instruction` is blank"),
        (5, "not a JSON object"),
    ]
    with pytest.raises(SettingsError, match=r"file.jsonl:2:1: broken JSON"):
        load(tmp_path, "cut", '[{"a": 1},\n')
    with pytest.raises(SettingsError, match="not UTF-8"):
        (tmp_path / "latin").write_bytes(b"\xe9")
        read_feedback(tmp_path / "latin", "cut")
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_feedback(tmp_path / "none", "cut")


# sparse_feedback


def test_sparse_ratings_with_their_quirks(tmp_path: Path) -> None:
    text = (
        "Say hi,nan,hi,6\n"
        'Add,"1, 2","three\n3",7.0\n'
        "Say hi,,hi,2\n"  # appended by a second run
        "Say hi,,bye,10\n"
        "Say hi,,hm,six\n"
        "too,few\n"
        '"open,x,y,1\n'
    )
    found = load(tmp_path, "sparse_ratings", text, "file.csv")
    assert judged_rows(found) == [
        ("Say hi", "hi", "rating", 6.0, None, None, "ok"),
        ("Add\n\nInput:\n1, 2", "three\n3", "rating", 7.0, None, None, "ok"),
        ("Say hi", "bye", "rating", None, None, None, "unparseable"),
        ("Say hi", "hm", "rating", None, None, None, "unparseable"),
    ]
    assert [(r.line, r.reason[:24]) for r in found.refused] == [
        (4, "its sample was already j"),
        (7, "2 columns instead of 4 ("),
        (8, "broken CSV: unexpected e"),
    ]
    assert found.notes == ("`nan` in the column input was read as no input (1 ×)",)


def test_sparse_rankings_with_header(tmp_path: Path) -> None:
    text = (
        "instruction,input,response1,response2,feedback\n"
        "P,,x,y,(a)\nP,,x,z,(b)\nP,,y,z,equal\nP,,z,y,(a)\nP,,x,x,(a)\nP,,x,w,(c)\n"
    )
    found = load(tmp_path, "sparse_rankings", text, "file.csv")
    texts = dict(found.samples.select("sample_id", "text").rows())
    won = {
        frozenset((texts[a], texts[b])): {"a": texts[a], "b": texts[b], "tie": "tie", None: None}[w]
        for a, b, w in found.pairs.select("sample_a", "sample_b", "winner").iter_rows()
    }
    assert won == {frozenset("xy"): "x", frozenset("xz"): "z", frozenset("yz"): "tie", frozenset("xw"): None}
    assert [(r.line, r.reason) for r in found.refused] == [
        (5, "its pair was already judged; the first judgement counts"),
        (6, "both responses are the same text"),
    ]
    assert found.pairs.schema == PAIRS and found.notes == ("the first line is a header (1 ×)",)


def test_ratings_and_rankings_of_a_text_share_its_sample_id(tmp_path: Path) -> None:
    ratings = load(tmp_path, "sparse_ratings", "P,,x,6\nP,,y,4\n", "ratings.csv")
    rankings = load(tmp_path, "sparse_rankings", "P,nan,x,y,(a)\n", "rankings.csv")
    assert set(ratings.samples["sample_id"]) == set(rankings.samples["sample_id"])


# Plain rows


def test_plain_rows(tmp_path: Path) -> None:
    lines = [
        {"prompt": "P", "response": "a", "value": 0},
        {"prompt": "P", "response": "b", "label": "good", "extra": 1},
        {"prompt": "P", "response": "c", "feedback": "Too long.", "value": 2},
        {"prompt": "P", "response": "d", "feedback": "Too long."},
        {"prompt": "P", "response": "e", "status": "failed", "reason": "timeout"},
        {"prompt": "P", "response_a": "a", "response_b": "b", "winner": "b"},
    ]
    found = load(tmp_path, "plain", "\n".join(map(json.dumps, lines)))
    assert found.feedback.select("kind", "value", "status").rows() == [
        ("reward", 0.0, "ok"),
        ("category", None, "ok"),
        ("text", 2.0, "ok"),
        ("judgment", None, "ok"),
        ("reward", None, "failed"),
    ]
    assert found.pairs.height == 1 and found.samples.height == 5
    assert found.notes == ("the column `extra` is ignored (1 ×)",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response": "a", "value": 1}, "no text in `prompt`"),
        ({"prompt": " ", "response": "a", "value": 1}, "`prompt` is blank"),
        ({"prompt": "P", "value": 1}, "no text in `response`"),
        ({"prompt": "P", "response": "a"}, "no judgement (value, label, feedback)"),
        ({"prompt": "P", "response": "a", "value": "1"}, "`value` is not a number"),
        ({"prompt": "P", "response": "a", "value": True}, "`value` is not a number"),
        ({"prompt": "P", "response": "a", "value": float("inf")}, "`value` is not finite"),
        ({"prompt": "P", "response": "a", "value": 10**400}, "`value` is not finite"),
        ({"prompt": "P", "response": "a", "label": 3}, "no text in `label`"),
        ({"prompt": "P", "response": "a", "value": 1, "kind": "x"}, "`kind` is not one of"),
        ({"prompt": "P", "response": "a", "value": 1, "status": "good"}, "`status` is not one of"),
        (
            {"prompt": "P", "response": "a", "value": 0, "status": "failed", "reason": "x"},
            "not ok must have a `reason` and no",
        ),
        ({"prompt": "P", "response": "a", "status": "failed"}, "not ok must have a `reason`"),
        ({"prompt": "P", "response": "a", "value": 1, "reason": "x"}, "`reason` is only for rows"),
        ({"prompt": "P", "response_a": "a", "winner": "a"}, "no text in `response_b`"),
        ({"prompt": "P", "response_a": "a", "response_b": "a", "winner": "a"}, "the same sample"),
        ({"prompt": "P", "response_a": "a", "response_b": "b", "winner": "c"}, "`winner` is not one of"),
    ],
)
def test_plain_rows_that_are_refused(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = load(tmp_path, "plain", json.dumps(row))
    assert len(found.refused) == 1 and reason in found.refused[0].reason
    assert found.samples.is_empty() and found.feedback.is_empty() and found.pairs.is_empty()


def test_plain_parquet_with_a_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pl.DataFrame({"prompt": ["P", "Q"], "response": ["a", None], "value": [1, 2]}).write_parquet(path)
    found = read_feedback(path, "plain")
    assert found.feedback["value"].to_list() == [1.0]
    assert [(r.line, r.reason) for r in found.refused] == [(2, "no text in `response`")]
    with pytest.raises(SettingsError, match=r"end in \.jsonl or \.parquet"):
        read_feedback(tmp_path / "f.txt", "plain")
    path.write_bytes(b"no parquet")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_feedback(path, "plain")


# Round trips

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS = TEXTS.filter(lambda t: bool(t.strip()))
CRITIQUES = (
    st.text("abcd ,.{}\"'", min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda t: any(c in "abc" for c in t))
)


def table(
    kind: str, judgement: st.SearchStrategy[dict[str, Any]]
) -> st.SearchStrategy[tuple[pl.DataFrame, pl.DataFrame]]:
    """Samples and their feedback: a few prompts, arbitrary texts, some judgements not ok."""
    other = st.sampled_from(["failed", "unparseable", "skipped"]).map(
        lambda s: {"status": s, "reason": f"{s} it was"}
    )
    rows = st.lists(
        st.tuples(st.sampled_from(["P", "Q\n", 'R"{},;']), TEXTS, st.one_of(judgement, judgement, other)),
        max_size=6,
    )

    def frames(drawn: list[tuple[str, str, dict[str, Any]]]) -> tuple[pl.DataFrame, pl.DataFrame]:
        order = sorted(range(len(drawn)), key=lambda i: drawn[i][0])  # prompts together, as in files
        samples = [
            {
                "sample_id": f"s{i}",
                "prompt_id": "",
                "prompt": drawn[i][0],
                "text": drawn[i][1],
                "reference": None,
            }
            for i in order
        ]
        empty = dict.fromkeys(FEEDBACK) | {
            "aspect": "imported",
            "kind": kind,
            "status": "ok",
            "call_keys": [],
        }
        feedback = [{**empty, "sample_id": f"s{i}", "scorer": "judge", **drawn[i][2]} for i in order]
        return pl.DataFrame(samples, SAMPLES), pl.DataFrame(feedback, FEEDBACK)

    return rows.map(frames)


REWARDS = table("reward", st.floats(-1e6, 1e6).map(lambda v: {"value": v}))
FEEDBACKS = table(
    "text", st.tuples(st.integers(0, 3), WORDS).map(lambda g: {"value": float(g[0]), "text": g[1]})
)
CATEGORIES = table(
    "category", st.sampled_from(["Harmful", "Harmless and helpful"]).map(lambda g: {"label": g})
)
JUDGMENTS = table(
    "judgment",
    st.one_of(st.just({"label": "perfect"}), CRITIQUES.map(lambda t: {"label": "flawed", "text": t})),
)
RATINGS = table("rating", st.integers(1, 7).map(lambda v: {"value": float(v)}))
JUDGED = ["value", "label", "text", "status", "reason", "kind"]

few_examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def round_trip(
    format_name: str,
    samples: pl.DataFrame,
    feedback: pl.DataFrame,
    pairs: pl.DataFrame | None = None,
    end: str = ".jsonl",
) -> tuple[Imported, dict[str, int]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{end}"
        written = write_feedback(path, format_name, samples, feedback, pairs)
        imported = read_feedback(path, format_name)
    assert imported.refused == ()
    return imported, written.left_out


@few_examples
@given(st.one_of(REWARDS, FEEDBACKS, CATEGORIES))
def test_alt_round_trip(frames: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    samples, feedback = frames
    found, left_out = round_trip("alt", samples, feedback)
    assert not left_out
    assert_frame_equal(
        found.samples.select("sample_id", "prompt", "text"), samples.select("sample_id", "prompt", "text")
    )
    assert_frame_equal(found.feedback.select("sample_id", *JUDGED), feedback.select("sample_id", *JUDGED))


@few_examples
@given(JUDGMENTS)
def test_cut_round_trip(frames: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    samples, feedback = frames
    found, left_out = round_trip("cut", samples, feedback)
    ok = feedback.filter(pl.col("status") == "ok")
    kept = samples.filter(pl.col("sample_id").is_in(ok["sample_id"].to_list()))
    assert found.feedback.height + sum(left_out.values()) == feedback.height
    assert_frame_equal(found.samples.select("prompt", "text"), kept.select("prompt", "text"))
    assert_frame_equal(found.feedback.select(JUDGED), ok.select(JUDGED))


@few_examples
@given(RATINGS)
def test_sparse_ratings_round_trip(frames: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    samples, feedback = frames
    found, left_out = round_trip("sparse_ratings", samples, feedback)
    joined = feedback.join(samples.rename({"text": "response"}), on="sample_id", maintain_order="left")
    first = joined.filter(pl.col("status") == "ok").unique(
        ["prompt", "response"], keep="first", maintain_order=True
    )
    assert found.feedback.height + sum(left_out.values()) == feedback.height
    assert [(r[0], r[1], r[3]) for r in judged_rows(found)] == first.select(
        "prompt", "response", "value"
    ).rows()


def pair_rows(samples: pl.DataFrame, winners: list[str | None]) -> pl.DataFrame:
    ids = samples.sort("sample_id")["sample_id"].to_list()
    prompts = dict(samples.select("sample_id", "prompt").rows())
    rows = []
    for i, (a, b) in enumerate((a, b) for a in ids for b in ids if a < b and prompts[a] == prompts[b]):
        winner = winners[i % len(winners)]
        state = {"winner": winner, "status": "ok"} if winner else {"status": "failed", "reason": "down"}
        row = (
            dict.fromkeys(PAIRS)
            | {"sample_a": a, "sample_b": b, "aspect": "ranking", "scorer": "judge"}
            | state
        )
        rows.append(row | {"call_keys": ["k1", "k2"], "favoured": "first" if winner == "tie" else None})
    return pl.DataFrame(rows, PAIRS)


WINNERS = st.lists(st.sampled_from(["a", "b", "tie", None]), min_size=1, max_size=5)


@few_examples
@given(REWARDS, WINNERS)
def test_sparse_rankings_round_trip(
    frames: tuple[pl.DataFrame, pl.DataFrame], winners: list[str | None]
) -> None:
    samples, pairs = frames[0], pair_rows(frames[0], winners)
    found, left_out = round_trip("sparse_rankings", samples, pairs, pairs)
    assert found.pairs.height + sum(left_out.values()) == pairs.height

    def won(imported: pl.DataFrame, texts: dict[str, str]) -> list[tuple[str, str]]:
        rows = imported.select("sample_a", "sample_b", "winner").iter_rows()
        return [
            (*sorted((texts[a], texts[b])), {"a": texts[a], "b": texts[b]}.get(w, "=tie")) for a, b, w in rows
        ]

    expected = won(pairs.filter(pl.col("status") == "ok"), dict(samples.select("sample_id", "text").rows()))
    got = won(found.pairs, dict(found.samples.select("sample_id", "text").rows()))
    assert set(got) <= set(expected) and bool(got) == any(first != second for first, second, _ in expected)


@few_examples
@given(
    st.one_of(REWARDS, FEEDBACKS, CATEGORIES, JUDGMENTS, RATINGS),
    WINNERS,
    st.sampled_from([".jsonl", ".parquet"]),
)
def test_plain_round_trip(
    frames: tuple[pl.DataFrame, pl.DataFrame], winners: list[str | None], end: str
) -> None:
    samples, feedback = frames
    pairs = pair_rows(samples, winners)
    found, left_out = round_trip("plain", samples, feedback, pairs, end)
    assert not left_out
    assert_frame_equal(found.samples.drop("prompt_id"), samples.drop("prompt_id"))
    assert_frame_equal(found.feedback, feedback)
    assert_frame_equal(found.pairs.drop("prompt_id"), pairs.drop("prompt_id"))


def test_what_cannot_be_written_is_counted_or_rejected(tmp_path: Path) -> None:
    names = {"sample_id": pl.String, "prompt": pl.String, "text": pl.String}
    samples = pl.DataFrame([(f"s{i}", "P", f"t{i}") for i in range(4)], names, orient="row")

    def feedback(*rows: dict[str, Any]) -> pl.DataFrame:
        empty = dict.fromkeys(FEEDBACK) | {"aspect": "x", "kind": "judgment", "status": "ok", "call_keys": []}
        return pl.DataFrame([{**empty, "sample_id": f"s{i}", **row} for i, row in enumerate(rows)], FEEDBACK)

    judged = feedback(
        {"label": "flawed", "text": "Wrong."},
        {"label": "flawed", "text": "Bad.", "value": 9.0},  # CUT would read the score as praise
        {"label": "flawed", "text": "Perfect, almost."},
        {"status": "failed", "reason": "down"},
    )
    written = write_feedback(tmp_path / "f.json", "cut", samples, judged)
    assert (written.rows, sum(written.left_out.values())) == (1, 3)
    assert "1 × failed: null would mean satisfactory" in written.summary()
    with pytest.raises(ValueError, match="rating files hold rating; this is judgment"):
        write_feedback(tmp_path / "f.csv", "sparse_ratings", samples, judged)
    with pytest.raises(ValueError, match="one aspect; found x, y"):
        write_feedback(tmp_path / "f.json", "cut", samples, pl.concat([judged, feedback({"aspect": "y"})]))
    with pytest.raises(ValueError, match="feedback of sample s0, which is not among"):
        write_feedback(tmp_path / "f.json", "cut", samples.clear(), judged)
    with pytest.raises(SettingsError, match="did you mean 'cut'"):
        write_feedback(tmp_path / "f.json", "cuts", samples, judged)
    assert not (tmp_path / "f.csv").exists() and len(FORMATS) == 8
