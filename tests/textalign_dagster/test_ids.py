"""Ids and seeds: stable forever, and distinct for distinct inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textalign_dagster.ids import canonical_json, content_hash, derive_seed, folder_hash, settings_diff

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_golden_values() -> None:
    # Tables of earlier versions are joined on these: a change orphans all existing artifacts.
    assert content_hash("prompt", "def f():") == "69e85303073b2564263f3129"
    assert content_hash("a", 1, 1.5, None, True, {"b": [1], "a": "ü"}) == "656e593a7db5a0aa4034fa1b"
    assert derive_seed(0, "draw", 1, "p", 0) == 9148666911444569172
    assert derive_seed() == 5881956788632184579


def test_boundaries_and_types_change_the_hash() -> None:
    values = [("ab", "c"), ("a", "bc"), ("abc",), (["a", "b", "c"],), ("a", "b", "c"), (1,), ("1",), (1.0,), (None,),
              ("null",), (True,), ("",), ("", ""), ({},), ([],), ()]  # fmt: skip
    assert len({content_hash(*value) for value in values}) == len(values)


def test_field_order_is_ignored_but_list_order_is_not() -> None:
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])


def test_nan_and_infinity_are_rejected() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            content_hash(value)


def test_lone_surrogates_are_rejected() -> None:
    with pytest.raises(UnicodeEncodeError):
        content_hash("\ud800")


@given(plain, plain)
def test_hash_is_24_hex_digits_and_distinguishes_values(a: object, b: object) -> None:
    assert len(content_hash(a)) == 24
    assert int(content_hash(a), 16) >= 0
    assert (content_hash(a) == content_hash(b)) == (canonical_json(a) == canonical_json(b))


@given(plain)
def test_seed_fits_a_signed_64_bit_integer(value: object) -> None:
    assert 0 <= derive_seed(value) < 2**63


def test_seeds_are_spread_evenly() -> None:
    seeds = [derive_seed(0, i) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert abs(sum(seed >> 62 for seed in seeds) - 1000) < 150  # the top bit is a fair coin


def test_folder_hash(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        (folder / "sub").mkdir(parents=True)
        (folder / "a").write_text("1")
        (folder / "sub" / "b").write_text("2")
    before = folder_hash(first, ["a", "sub/b"])
    assert before == folder_hash(second, ["a", "sub/b"]) == folder_hash(first, ["sub/b", "a"])
    (first / "c").write_text("")
    assert folder_hash(first, ["a", "sub/b", "c"]) != before
    assert folder_hash(first, ["a"]) == folder_hash(second, ["a"])
    (second / "a").rename(second / "aa")
    assert folder_hash(second, ["aa", "sub/b"]) != before  # file names matter
    (first / "a").write_text("12")
    (first / "sub" / "b").write_text("")
    assert folder_hash(first, ["a", "sub/b"]) != before  # and so do file boundaries


def test_settings_diff() -> None:
    old = {"a": 1, "s": {"x": 1, "y": [1]}, "gone": 2}
    new = {"a": 1, "s": {"x": 2, "y": [1]}, "new": None, "s2": {"z": 1}}
    assert settings_diff(old, new) == ["gone: 2 -> None", "s.x: 1 -> 2", "s2: None -> {'z': 1}"]
    assert settings_diff(old, old) == []
    assert settings_diff({"s": {"x": 1}}, {"s": None}) == ["s: {'x': 1} -> None"]


@given(
    st.dictionaries(st.text(max_size=3), plain, max_size=4),
    st.dictionaries(st.text(max_size=3), plain, max_size=4),
)
def test_diff_is_empty_only_for_equal_settings(a: dict[str, object], b: dict[str, object]) -> None:
    assert settings_diff(a, a) == []
    # In a diff, an absent field and one that is None are the same.
    bare = [{k: v for k, v in settings.items() if v is not None} for settings in (a, b)]
    if bare[0] != bare[1] and not any(isinstance(v, dict) for settings in bare for v in settings.values()):
        assert settings_diff(a, b)
