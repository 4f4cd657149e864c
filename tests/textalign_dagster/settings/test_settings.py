"""Strict settings: YAML that means what it says, overrides, and errors that name the remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from textalign_dagster.settings import (
    Settings,
    SettingsError,
    describe,
    merge,
    nearest,
    nested,
    parse_override,
    parse_yaml,
    read_yaml,
    validate,
    write_yaml,
)


class Inner(Settings):
    rate: float = Field(1e-8, gt=0, description="How fast.")
    label: str | None = Field(None, description="A name.")


class Apple(Settings):
    name: Literal["apple"] = "apple"
    seeds: int = Field(3, ge=0)


class Pear(Settings):
    name: Literal["pear"] = "pear"
    shape: Literal["round", "long"] = "long"


class Outer(Settings):
    text: str = Field(..., description="Any text.")
    count: int = 1
    on: bool = False
    pair: tuple[float, float] = Field((0.9, 0.99), strict=False)
    words: tuple[str, ...] = Field((), strict=False)
    shares: dict[str, float] | None = None
    inner: Inner = Field(Inner(), description="A section.")
    fruit: Annotated[Apple | Pear, Field(discriminator="name")] = Apple()


def problem(content: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as caught:
        validate(Outer, {"text": "a", **content}, "x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-1", -1), ("+3", 3), ("0777", 777), ("1.", 1.0), (".5", 0.5),
        ("-2.5e-3", -0.0025), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"), ("0x1f", "0x1f"), ("1_000", "1_000"), ("'1e-4'", "1e-4"),
        ("a=b", "a=b"), ("http://host:80/x", "http://host:80/x"), ("[1, -2, 1e-3, no]", [1, -2, 1e-3, "no"]),
        ("{a: 1, <<: {b: 2}}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1", "'a' is given twice"),
        ("a: {b: 1, b: 2}", "f.yaml:1:11", "'b' is given twice"),
        ("a: 1\nb: c: d", "f.yaml:2:5", "mapping values are not allowed here"),
        ("a: [1", "f.yaml:1:6", "expected ',' or ']'"),
        ("a: *x", "f.yaml:1:4", "undefined alias"),
        ("a:\n\t- 1", "f.yaml:2:1", "cannot start any token"),
        ("a: {{b}: 1}", "f.yaml:1:5", "not a list or a mapping"),
        ("? [a]\n: 1", "f.yaml:1:3", "not a list or a mapping"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:1:4", "could not determine a constructor"),
        ("a: \0", "f.yaml", "special characters are not allowed"),
    ],
)
def test_broken_yaml_names_the_place(text: str, place: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith(place)
    assert expected in str(caught.value)


def test_a_file_must_be_readable_and_hold_fields(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for content, expected in (
        (b"a: \xff", "not UTF-8 (byte 3)"),
        (b"- 1", "expected fields"),
        (b"", "expected fields"),
    ):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match=r"x\.yaml: ") as caught:
            read_yaml(path)
        assert expected in str(caught.value)
    with pytest.raises(SettingsError, match="no such file"):
        read_yaml(tmp_path / "y.yaml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    path.write_bytes("\ufefftext: ä".encode())  # as Windows Notepad saves it
    assert read_yaml(path) == {"text": "ä"}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
TRICKY = [
    "1e-4",
    "no",
    "true",
    "null",
    "~",
    "0777",
    "1_000",
    "1:30",
    "=",
    "<<",
    "0x1f",
    "2026-01-01",
    "#a",
    ".5",
    "- a",
]


@given(json_like | st.sampled_from(TRICKY))
def test_written_yaml_is_read_back(value: object) -> None:
    assert parse_yaml(write_yaml({"x": value}), "x") == {"x": value}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=1", ["seed"], 1), ("a.b.c=1e-4", ["a", "b", "c"], 1e-4), ("a=-1", ["a"], -1),
        ("a=true", ["a"], True), ("a=no", ["a"], "no"), ("a=[1, 2.5, x]", ["a"], [1, 2.5, "x"]),
        ("a=x=y", ["a"], "x=y"), ("a=b:c", ["a"], "b:c"), ("a='x: y'", ["a"], "x: y"), ("a=", ["a"], None),
        ("a=null", ["a"], None), ("a={b: 1}", ["a"], {"b": 1}), (" a . b = 1", ["a", "b"], 1),
        ("a=no issues, please", ["a"], "no issues, please"),
    ],
)  # fmt: skip
def test_overrides_are_read_as_yaml(override: str, path: list[str], value: object) -> None:
    assert parse_override(override) == (path, value)


@pytest.mark.parametrize("override", ["a", "=1", ".a=1", "a.=1", "a..b=1", ""])
def test_overrides_need_a_field_and_a_value(override: str) -> None:
    with pytest.raises(SettingsError, match=r"write it as section\.field=value"):
        parse_override(override)


def test_the_error_for_an_override_that_is_not_yaml_shows_how_to_quote_it() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_override("method.template={condition} then {prompt}")
    message = str(caught.value)
    suggested = message.partition("--set '")[2].rpartition("'")[0]
    assert parse_override(suggested) == (["method", "template"], "{condition} then {prompt}")


@given(st.text())
def test_an_override_is_parsed_or_rejected(text: str) -> None:
    try:
        path, _ = parse_override(text)
    except SettingsError as error:
        assert "--set" in str(error)
    else:
        assert all(path)


def test_merge_overlays_sections() -> None:
    base = {"a": 1, "s": {"x": 1, "y": {"z": 2}}, "l": [1, 2]}
    assert merge(base, {"s": {"y": {"z": 3}}}) == {"a": 1, "s": {"x": 1, "y": {"z": 3}}, "l": [1, 2]}
    assert merge(base, {"l": [3]})["l"] == [3]
    assert merge(base, {"s": None})["s"] is None
    assert merge({"s": None}, {"s": {"x": 1}}) == {"s": {"x": 1}}
    assert base == {"a": 1, "s": {"x": 1, "y": {"z": 2}}, "l": [1, 2]}


def test_merge_drops_the_options_of_another_method() -> None:
    base = {"method": {"name": "alt_lmu", "ask_for": "x"}}
    assert merge(base, {"method": {"name": "quark"}}) == {"method": {"name": "quark"}}
    assert merge(base, {"method": {"name": "alt_lmu", "probe": []}})["method"]["ask_for"] == "x"
    assert merge(base, {"method": {"ask_for": "y"}}) == {"method": {"name": "alt_lmu", "ask_for": "y"}}


def test_nested() -> None:
    assert nested(["a", "b"], 1) == {"a": {"b": 1}}


def test_nearest() -> None:
    assert nearest("quak", ["quark", "alt_rm"]) == " (did you mean 'quark'?)"
    assert nearest("zzz", ["quark", "alt_rm"]) == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"cuont": 1}, "x.yaml: cuont: unknown field (did you mean 'count'?); known here: text, count, on"),
        ({"rate": 1.0}, "rate: unknown field (did you mean 'inner.rate'?)"),
        ({"inner": {"rat": 1.0}}, "inner.rat: unknown field (did you mean 'rate'?); known here: rate, label"),
        ({"inner": {"xyzxyz": 1}}, "inner.xyzxyz: unknown field; known here: rate, label"),
        ({"fruit": {"name": "pear", "shap": "long"}}, "fruit.shap: unknown field (did you mean 'shape'?); known here: name"),
        ({"fruit": {"name": "pear", "seeds": 1}}, "fruit.seeds: unknown field; known here: name, shape"),
        ({"fruit": {"name": "aple"}}, "fruit: unknown name 'aple' (did you mean 'apple'?); one of: apple, pear"),
        ({"fruit": {}}, "fruit.name: missing; one of: apple, pear"),
        ({"fruit": {"name": "pear", "shape": "rond"}}, "'rond' is not allowed (did you mean 'round'?); one of: round or long"),
        ({"fruit": {"name": "apple", "seeds": -1}}, "fruit.seeds: -1 given, but it should be greater than or equal to 0"),
        ({"count": "1"}, "count: '1' given, but it should be a whole number"),
        ({"count": True}, "count: True given, but it should be a whole number"),
        ({"count": 1.0}, "count: 1.0 given, but it should be a whole number"),
        ({"on": "yes"}, "on: 'yes' given, but it should be true or false"),
        ({"on": 1}, "on: 1 given, but it should be true or false"),
        ({"text": 3}, "text: 3 given, but it should be text"),
        ({"inner": {"rate": "1e-4 "}}, "inner.rate: '1e-4 ' given, but it should be a number"),
        ({"inner": {"rate": 0}}, "inner.rate: 0 given, but it should be greater than 0"),
        ({"inner": {"rate": math.inf}}, "inner.rate: inf given, but it should be a finite number"),
        ({"inner": 3}, "inner: 3 given, but it should be a section of fields"),
        ({"words": "one"}, "words: 'one' given, but it should be a list"),
        ({"words": [1]}, "words.0: 1 given, but it should be text"),
        ({"shares": {"a": "x"}}, "shares.a: 'x' given, but it should be a number"),
    ],
)  # fmt: skip
def test_errors_name_file_field_and_remedy(content: dict[str, Any], expected: str) -> None:
    message = problem(content)
    assert expected in message
    assert message.startswith("x.yaml: ")
    assert "\n" not in message


def test_every_problem_is_reported_once() -> None:
    lines = problem({"cuont": 1, "inner": {"rate": -1.0}}).splitlines()
    assert len(lines) == 2
    with pytest.raises(SettingsError, match=r"^x\.yaml: text: missing; add it$"):
        validate(Outer, {}, "x.yaml")


def test_floats_can_be_written_without_a_decimal_point() -> None:
    assert validate(Outer, {"text": "a", "inner": {"rate": 1}}, "x").inner.rate == 1.0
    assert validate(Outer, {"text": "a", "pair": [0, 1]}, "x").pair == (0.0, 1.0)


@given(
    text=st.text() | st.sampled_from(TRICKY),
    count=st.integers(),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    label=st.none() | st.text() | st.sampled_from(TRICKY),
    words=st.lists(st.text() | st.sampled_from(TRICKY), max_size=3),
    shares=st.none()
    | st.dictionaries(st.text(max_size=5) | st.sampled_from(TRICKY), st.floats(0, 1), max_size=3),
    fruit=st.sampled_from([Apple(seeds=0), Pear(shape="round")]),
)
def test_the_description_is_yaml_of_the_same_settings(
    text: str,
    count: int,
    rate: float,
    label: str | None,
    words: list[str],
    shares: dict[str, float] | None,
    fruit: Any,
) -> None:
    settings = Outer(
        text=text,
        count=count,
        inner=Inner(rate=rate, label=label),
        words=tuple(words),
        shares=shares,
        fruit=fruit,
    )
    described = describe(settings)
    assert validate(Outer, parse_yaml(described, "described"), "described") == settings
    assert "# How fast." in described
    assert "# Any text." in described
