"""`sampling.structured`: what is rejected before anything starts, and what identifies samples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from resources.engines.sampler import Decoding
from resources.engines.structure import refusal
from textalign_dagster import PROJECT
from textalign_dagster.cli import engine_checks, preflight
from textalign_dagster.experiment.files import Library
from textalign_dagster.ids import content_hash
from textalign_dagster.loop.stages import STAGES, stage_settings
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.sampling import Sampling
from textalign_dagster.settings.structured import Structured, content_of

VLLM = ("sampling.engine=vllm", "sampling.ignore_eos=false", "sampling.min_new_tokens=0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give exactly one of choice, regex, json_schema, grammar, not none"),
        ({"choice": ["a"], "regex": "a"}, "give exactly one .* not choice and regex"),
        ({"choice": []}, "give at least one text"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": ["a", "a"]}, "is listed twice"),
        ({"regex": "a("}, r"'a\(' is not a regular expression \(missing \)"),
        ({"regex": ""}, "non-empty"),
        ({"grammar": "a: 'b'"}, "write it in EBNF, beginning with `root ::= …`"),
    ],
)
def test_empty_or_invalid_structures_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Structured.model_validate(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "transformers"}, "`engine: transformers` samples free text only; set `engine: vllm`"),
        ({"engine": "vllm", "ignore_eos": True}, "ends where its structure does; remove min_new_tokens"),
        ({"engine": "vllm", "min_new_tokens": 2}, "ends where its structure does; remove min_new_tokens"),
    ],
)
def test_conflicting_sampling_settings_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling.model_validate({**given, "structured": {"regex": "a+"}})


def test_structured_decoding_rejects_min_new_tokens_and_ignore_eos() -> None:
    for more in ({"ignore_eos": True}, {"min_new_tokens": 1}):
        with pytest.raises(ValueError, match="leave out min_new_tokens and ignore_eos"):
            Decoding(1.0, structured={"regex": "a"}, **more)  # type: ignore[arg-type]


def test_the_identity_of_free_text_is_unchanged() -> None:
    identity = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "min_new_tokens": 0,
        "ignore_eos": False, "banned_tokens": ["x"],
    }  # fmt: skip
    decoding = Decoding(1.0, max_new_tokens=8, banned_tokens=("x",))
    assert content_hash(decoding.identity) == content_hash(identity)
    structured = Decoding(1.0, max_new_tokens=8, banned_tokens=("x",), structured={"choice": ["a"]})
    assert structured.identity == {**identity, "structured": {"choice": ["a"]}}


def test_a_schema_file_is_identified_by_its_content(toys: Path) -> None:
    folder = toys / "schemas"
    folder.mkdir()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for name in ("one.json", "other.json"):
        (folder / name).write_text(json.dumps(schema, indent=2 if name == "one.json" else None))
    body = "extends: toy\nsampling: {engine: vllm, ignore_eos: false, structured: {json_schema: %s}}\n"
    for name, value in (
        ("one", "schemas/one.json"),
        ("other", "schemas/other.json"),
        ("own", json.dumps(schema)),
    ):
        (toys / f"{name}.yaml").write_text(body % value)
    library = Library((toys, PROJECT / "experiments"))
    one, other, own = (library.load(name) for name in ("one", "other", "own"))
    assert one.sampling.structured != other.sampling.structured
    for stage in STAGES:
        settings = [stage_settings(experiment, stage, 1) for experiment in (one, other, own)]
        assert settings[0] == settings[1] == settings[2]
        structured = settings[0].get("sampling", {}).get("structured")
        assert structured == ({"json_schema": schema} if stage in ("generations", "evaluation") else None)
    free = library.overridden("toy", ["sampling.engine=vllm", "sampling.ignore_eos=false"])
    assert "structured" not in stage_settings(free, "generations", 1)["sampling"]
    (folder / "one.json").write_text(json.dumps({**schema, "required": ["a"]}))
    assert stage_settings(one, "generations", 1) != stage_settings(other, "generations", 1)


def test_another_structure_replaces_an_inherited_one(toys: Path) -> None:
    (toys / "chosen.yaml").write_text(
        "extends: toy\nsampling: {engine: vllm, ignore_eos: false, structured: {choice: [a, b]}}\n"
    )
    (toys / "matched.yaml").write_text("extends: chosen\nsampling: {structured: {regex: a+}}\n")
    library = Library((toys, PROJECT / "experiments"))
    assert content_of(library.load("matched").sampling.structured) == {"regex": "a+"}
    changed = library.overridden("chosen", ["sampling.structured={regex: b+}"])
    assert content_of(changed.sampling.structured) == {"regex": "b+"}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "s.json: no such file; give a JSON file"),
        ("{", "s.json: not JSON"),
        ("[1]", "contains .* but a schema is an object"),
        ("{}", "the schema is empty"),
    ],
)
def test_errors_name_files_that_contain_no_schema(tmp_path: Path, written: str | None, message: str) -> None:
    path = tmp_path / "s.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(SettingsError, match=f"^sampling.structured.json_schema: .*{message}"):
        content_of(Structured(json_schema=str(path)))


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (
            {"json_schema": {"properties": {"a": {"type": "nonsense"}}}},
            "^properties/a/type: 'nonsense' is not valid",
        ),
        ({"regex": "a(?=b)"}, "^Regex .* Lookahead is not supported"),
        ({"grammar": "root ::= nobody"}, '^EBNF .*"nobody" is not defined'),
        ({"grammar": 'root ::= "a" root | "b"'}, None),
        ({"choice": ["a"]}, None),
    ],
)
def test_structures_that_cannot_be_compiled(structured: dict[str, Any], message: str | None) -> None:
    pytest.importorskip("xgrammar", reason="comes with vLLM")
    why = refusal(structured)
    assert why is None if message is None else why is not None and re.search(message, why)


def test_preflight_rejects_structures_that_cannot_be_compiled(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar", reason="comes with vLLM")
    monkeypatch.setattr(engine_checks, "_vllm", lambda: {"version": "0", "device": "cpu"})
    library = Library((toys, PROJECT / "experiments"))
    good = preflight.preflight(library, "toy", [*VLLM, "sampling.structured.regex=a+"])
    assert "samples: structured output by a regex" in good
    with pytest.raises(
        SettingsError, match=r"toy.yaml: sampling.structured.regex: cannot be compiled .*; fix it"
    ):
        preflight.preflight(library, "toy", [*VLLM, "sampling.structured.regex='a(?=b)'"])
