"""ALT's files at every stage, written by hand in the format of the released scripts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from textalign_dagster.cli.main import main
from textalign_dagster.feedback_files.alt import read_alt, write_alt_toxicity
from textalign_dagster.feedback_files.alt_prompts import (
    Conditioned,
    alt_stage,
    read_alt_prompts,
    write_alt_prompts,
    write_alt_samples,
)
from textalign_dagster.prompts import read_prompt_file
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import FEEDBACK

POST = "SUBREDDIT: r/x\nTITLE: t\nPOST: The form says input: name.\nTL;DR:"
DIALOGUE = "Human: I like cats.\n\nAssistant: Me too.\n\nHuman: Why?\n\nAssistant:"


def file(folder: Path, *rows: Any, name: str = "file.json") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")  # no newline at the end
    return path


def textalign(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        ({"prompt": POST}, "prompts"),
        ({"prompt": {"text": "So", "toxicity": 0.1}, "continuation": {"text": "x"}}, "prompts"),
        ({"prompt": POST, "generations": ["a"]}, "samples"),
        ({"prompt": POST, "generations": ["a"], "rewards": [1.5]}, "feedback"),
        ({"prompt": POST, "generations": ["a"], "feedbacks": ["Good."], "scores": [3]}, "feedback"),
        ({"prompt": POST, "generations": ["a"], "perplexity": 3.0}, "feedback"),
        ({"prompt": "P", "generations": [{"text": "a", "toxicity": 0.5}]}, "feedback"),
    ],
)
def test_stage_is_determined_by_the_fields(tmp_path: Path, row: dict[str, Any], stage: str) -> None:
    assert alt_stage(file(tmp_path, row, row)) == stage


def test_prompts_are_read_unchanged_unless_a_template_is_given(tmp_path: Path) -> None:
    path = file(tmp_path, {"prompt": f"Excellent. input: {POST}"}, {"prompt": "Excellent. input: Q"})
    assert read_alt_prompts(path).prompts["prompt"].to_list() == [
        f"Excellent. input: {POST}", "Excellent. input: Q"
    ]  # fmt: skip
    found = read_alt_prompts(path, template="Excellent. input: {prompt}")
    assert found.prompts.rows() == [(POST, None, None), ("Q", None, None)]
    found = read_alt_prompts(path, template="{condition} input: {prompt}")
    assert found.prompts.rows() == [(POST, None, "Excellent."), ("Q", None, "Excellent.")]
    assert (found.rows, found.refused) == (2, ())


def test_only_the_condition_is_stripped_from_a_dialogue(tmp_path: Path) -> None:
    """The released code split at blank lines and kept the last piece: here, `Assistant:`."""
    path = file(tmp_path, {"prompt": f"Harmless and very helpful.\n\n{DIALOGUE}"})
    found = read_alt_prompts(path, template="{condition}.\n\n{prompt}")
    assert found.prompts.row(0) == (DIALOGUE, None, "Harmless and very helpful")


def test_prompts_that_do_not_match_the_template_are_refused(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {"prompt": "Bad. input: P"},
        {"prompt": "P"},
        {"prompt": "Excellent. input:P"},
        {"x": 1},
        [1],
    )
    found = read_alt_prompts(path, template="Excellent. input: {prompt}")
    assert found.prompts.is_empty()
    assert [(r.line, r.reason) for r in found.refused] == [
        (1, "its prompt does not match --template"),
        (2, "its prompt does not match --template"),
        (3, "its prompt does not match --template"),
        (4, "no text in `prompt`"),
        (5, "not a JSON object"),
    ]
    assert "5 rows: 0 prompts; refused: 5" in found.summary()


@pytest.mark.parametrize(
    "template", ["{condition}", "{prompt} {prompt}", "{condition}{prompt}", "{prompt} {condition}", "x"]
)
def test_irreversible_templates_are_rejected(template: str) -> None:
    with pytest.raises(SettingsError, match="--template"):
        Conditioned(template)


def test_text_around_the_prompt_is_stripped_on_both_sides() -> None:
    both = Conditioned("[{condition}] <{prompt}>")
    assert both.undo("[a] <b] <c>") == ("a", "b] <c")  # the condition ends at the first match
    assert Conditioned("<{prompt}>").undo("<>>") == (None, ">")


def test_prompts_of_realtoxicityprompts_and_repeats(tmp_path: Path) -> None:
    path = file(tmp_path, {"prompt": {"text": "So"}}, {"prompt": "So"}, {"prompt": "And", "reference": "x"})
    found = read_alt_prompts(path)
    assert found.prompts.rows() == [("So", None, None), ("And", "x", None)]
    assert found.notes == ("a prompt is repeated; it is kept once (1 ×)",)


def test_samples_have_no_feedback_but_report_their_condition(tmp_path: Path) -> None:
    path = file(tmp_path, {"prompt": f"Good. input: {POST}", "generations": ["a", "a", ""]})
    found = read_alt(path, template="{condition} input: {prompt}")
    assert found.samples["prompt"].unique().to_list() == [POST]
    assert found.samples["text"].to_list() == ["a", "a", ""]  # repeats are separate samples
    assert found.feedback["status"].unique().to_list() == ["skipped"]
    assert "sampled under the condition 'Good.' (1 ×)" in found.notes
    assert read_alt(path).samples["prompt"][0] == f"Good. input: {POST}"


def test_perplexity_is_kept_only_for_single_generations(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {"prompt": "P", "generations": ["a"], "rewards": [2.0], "perplexity": 12.5},
        {"prompt": "Q", "generations": ["b"], "perplexity": 3},
        {"prompt": "R", "generations": ["c"], "perplexity": float("nan")},
        {"prompt": "S", "generations": ["d", "e"], "perplexity": 4.0},
    )
    found = read_alt(path, aspect="rm")
    rows = found.feedback.select("aspect", "kind", "value", "status").rows()
    assert rows == [
        ("rm", "reward", 2.0, "ok"),
        ("perplexity", "reward", -12.5, "ok"),
        ("perplexity", "reward", -3.0, "ok"),
        ("perplexity", "reward", None, "unparseable"),
        ("rm", "none", None, "skipped"),
        ("rm", "none", None, "skipped"),
    ]
    assert "`perplexity` is not kept: its line has several generations (1 ×)" in found.notes


class Mark:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["datapool.pkl", "datapool.json"])
def test_pickle_is_rejected_and_not_executed(tmp_path: Path, name: str) -> None:
    path, mark = tmp_path / name, tmp_path / "mark"
    path.write_bytes(pickle.dumps(Mark(mark)))
    for read in (alt_stage, read_alt, read_alt_prompts):
        with pytest.raises(SettingsError, match=r"is a pickle.*import those"):
            read(path)
    done = textalign("import", path, tmp_path / "out.jsonl", "--format", "alt")
    assert done.exit_code == 1 and "is a pickle" in done.stderr
    assert not mark.exists() and not (tmp_path / "out.jsonl").exists()


def test_file_emptied_by_a_concatenation_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("\n")
    done = textalign("import", tmp_path / "empty.json", tmp_path / "out.jsonl", "--format", "alt")
    assert done.exit_code == 1 and "import the shards" in done.stderr


def test_imported_prompts_can_be_used_by_an_experiment(tmp_path: Path) -> None:
    path = file(
        tmp_path, {"prompt": f"Harmful.\n\n{DIALOGUE}"}, {"prompt": "Harmful.\n\nHuman: Hi\n\nAssistant:"}
    )
    for end in ("jsonl", "parquet"):
        target = tmp_path / f"prompts.{end}"
        done = textalign("import", path, target, "--format", "alt", "--template", "{condition}.\n\n{prompt}")
        assert done.exit_code == 0 and "2 rows: 2 prompts; refused: 0" in done.stdout, done.output
        assert read_prompt_file(target)["prompt"].to_list() == [DIALOGUE, "Human: Hi\n\nAssistant:"]
    refused = textalign(
        "import", path, tmp_path / "p.jsonl", "--format", "alt", "--template", "Good. {prompt}"
    )
    assert refused.exit_code == 1 and "2 of 2 rows are refused" in refused.stderr
    wrong = textalign("import", path, tmp_path / "p.txt", "--format", "alt")
    assert wrong.exit_code == 1 and "end in .jsonl or .parquet" in wrong.stderr
    other = textalign("import", path, tmp_path / "p.jsonl", "--format", "cut", "--template", "{prompt}")
    assert other.exit_code == 1 and "carry no conditions" in other.stderr


def test_samples_round_trip_in_the_format_of_alt(tmp_path: Path) -> None:
    generations = pl.DataFrame(
        [("s1", "P", "Good.", "a"), ("s2", "P", "Good.", "b"), ("s3", "Q", None, "c")],
        ["sample_id", "prompt", "condition", "text"],
        orient="row",
    )
    path = tmp_path / "samples.json"
    assert write_alt_samples(path, generations, "{condition} input: {prompt}").rows == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"prompt": "Good. input: P", "generations": ["a", "b"], "sample_ids": ["s1", "s2"]},
        {"prompt": "Q", "generations": ["c"], "sample_ids": ["s3"]},
    ]
    back = read_alt(file(tmp_path, lines[0]), template="{condition} input: {prompt}")
    assert back.samples.select("sample_id", "prompt", "text").rows() == [("s1", "P", "a"), ("s2", "P", "b")]


def test_prompts_are_exported(tmp_path: Path) -> None:
    draws = pl.DataFrame({"draw_id": [1, 2], "prompt": ["P", "Q"], "reference": [None, "r"]})
    write_alt_prompts(tmp_path / "p.json", draws)
    assert (tmp_path / "p.json").read_text() == '{"prompt": "P"}\n{"prompt": "Q", "reference": "r"}\n'


def test_toxicity_round_trip(tmp_path: Path) -> None:
    samples = pl.DataFrame({"sample_id": ["a", "b"], "prompt": ["P", "P"], "text": ["x", "y"]})
    empty = dict.fromkeys(FEEDBACK) | {"aspect": "t", "kind": "reward", "call_keys": []}
    rows = [
        {**empty, "sample_id": "a", "status": "ok", "value": 0.75},
        {**empty, "sample_id": "b", "status": "failed", "reason": "down"},
    ]
    path = tmp_path / "reward.json"
    write_alt_toxicity(path, samples, pl.DataFrame(rows, FEEDBACK))
    line = json.loads(path.read_text())
    assert line["generations"] == [{"text": "x", "toxicity": 0.25}, {"text": "y", "toxicity": None}]
    back = read_alt(path)
    assert back.feedback.select("sample_id", "value", "status", "reason").rows() == [
        ("a", 0.75, "ok", None),
        ("b", None, "failed", "down"),
    ]
    rows[0]["value"] = 2.5
    with pytest.raises(ValueError, match="is not a toxicity"):
        write_alt_toxicity(path, samples, pl.DataFrame(rows, FEEDBACK))
    rows[0]["value"] = -0.25  # as our own scorers return it
    write_alt_toxicity(path, samples, pl.DataFrame(rows, FEEDBACK), negated=True)
    assert json.loads(path.read_text())["generations"] == line["generations"]
