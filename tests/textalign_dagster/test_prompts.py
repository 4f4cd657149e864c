"""Prompt files are checked before any money is spent; draws are pure functions of their seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textalign_dagster.ids import derive_seed
from textalign_dagster.prompts import Prompts, draw_prompts, prompt_id, read_prompt_file
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import PROMPT_DRAWS


def table(count: int) -> pl.DataFrame:
    return pl.DataFrame({"prompt": [f"prompt {i}" for i in range(count)]}).select(
        "prompt", reference=pl.lit(None, dtype=pl.String), source=pl.lit("s"), source_revision=pl.lit("r")
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", None, "a.jsonl: no such prompt file"),
        ("a.txt", b"x", "a.txt: prompt files end in .jsonl, .json, .csv, .parquet"),
        ("a", b"x", "prompt files end in"),
        ("a.jsonl", b"", "a.jsonl: the file has no prompts"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file has no prompts"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "a.jsonl:2: not JSON: Expecting ',' delimiter"),
        ("a.jsonl", b"\n[1]", 'a.jsonl:2: expected an object such as {"prompt": "'),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "a.jsonl:2: `prompt` holds 3, not text"),
        (
            "a.jsonl",
            b'{"prompt": "a", "reference": {"x": 1}}',
            "a.jsonl:1: `reference` holds {'x': 1}, not text",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "id": 1}',
            "a.jsonl: no column `prompt`; found text, id: rename one of them",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}', "a.jsonl: blank prompt in row 2; fill in or remove"),
        ("a.jsonl", b'{"prompt": "\xff"}', "a.jsonl: not UTF-8 (byte 12); save it as UTF-8"),
        ("a.jsonl", b'{"prompt": " "}\n{"prompt": ""}\n{"prompt": null}', "blank prompt in rows 1, 2, 3"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n' * 9,
            "the same prompt more than once, in rows 1, 2, 3, 4, 5 and 4 more",
        ),
        ("a.csv", b"", "a.csv: the file is empty"),
        ("a.csv", b"prompt\n", "a.csv: the file has no prompts"),
        ("a.csv", b"text\na\n", "a.csv: no column `prompt`; found text"),
        ("a.csv", b"prompt\na\na\n", "a.csv: the same prompt more than once, in rows 1, 2; keep one"),
        ("a.csv", b"prompt\n\xe9\n", "a.csv: not UTF-8 (byte 7)"),
        ("a.csv", b"prompt\na,b\n", "a.csv: cannot be read as .csv: "),
        ("a.csv", b'prompt\n"a\n', "a.csv: cannot be read as .csv: "),
        ("a.parquet", b"", "a.parquet: cannot be read as .parquet: "),
        ("a.parquet", b"PAR1 nonsense PAR1", "a.parquet: cannot be read as .parquet: "),
    ],
)
def test_bad_file_raises_a_one_line_message(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_prompt_file(tmp_path / name)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message


def test_folder_and_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        (tmp_path / f"d{suffix}").mkdir()
        with pytest.raises(SettingsError, match="is a folder; give one file"):
            read_prompt_file(tmp_path / f"d{suffix}")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SettingsError, match=r"x\.jsonl: cannot be read as \.jsonl: Permission denied"):
        read_prompt_file(tmp_path / "x.jsonl")


def test_parquet_with_the_wrong_type(tmp_path: Path) -> None:
    pl.DataFrame({"prompt": [1, 2]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SettingsError, match="column `prompt` holds Int64, not text"):
        read_prompt_file(tmp_path / "a.parquet")
    pl.DataFrame({"prompt": ["a"], "reference": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SettingsError, match="column `reference` holds Int64, not text"):
        read_prompt_file(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_all_three_formats_are_read_the_same(tmp_path: Path, suffix: str) -> None:
    expected = pl.DataFrame(
        {"prompt": ["a\nb", 'say "ü", 1', "3", "c\u2028d"], "reference": ["r", "", None, "x"]}
    )
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        extra = [{"meta": {"x": 1}}, {"meta": [2]}, {"meta": "three"}, {}]
        rows = [{**row, **more} for row, more in zip(expected.to_dicts(), extra, strict=True)]
        path.write_text(
            "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
        )
    elif suffix == "csv":
        expected.with_columns(meta=pl.lit(1)).write_csv(path)
    else:
        expected.write_parquet(path)
    prompts = read_prompt_file(path)
    assert prompts.columns == ["prompt", "reference", "source", "source_revision"]
    assert prompts["prompt"].to_list() == expected["prompt"].to_list()
    assert prompts["reference"].fill_null("").to_list() == expected["reference"].fill_null("").to_list()
    assert set(prompts["source"]) == {path.name}
    assert prompts["source_revision"].n_unique() == 1


def test_references_are_optional(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert read_prompt_file(tmp_path / "p.jsonl").schema["reference"] == pl.String
    pl.DataFrame({"prompt": ["a"], "reference": [None]}).write_parquet(tmp_path / "p.parquet")
    assert read_prompt_file(tmp_path / "p.parquet")["reference"].to_list() == [None]


def draw(prompts: pl.DataFrame, iteration: int = 1, seed: int = 0, **settings: object) -> pl.DataFrame:
    weights = settings.pop("by", None)
    return draw_prompts(prompts, Prompts(**settings), seed=seed, iteration=iteration, weights=weights)  # type: ignore[arg-type]


SETTINGS = [
    {"draw": "without_replacement"},
    {"draw": "with_replacement"},
    {"draw": "windows"},
    {"draw": "weighted", "weights": "q"},
]


@given(
    settings=st.sampled_from(SETTINGS),
    count=st.integers(2, 30),
    seed=st.integers(0, 5),
    iteration=st.integers(1, 2),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_draw_is_a_pure_function_of_prompts_seed_and_iteration(
    settings: dict[str, str], count: int, seed: int, iteration: int, shuffle: object
) -> None:
    prompts = table(count)
    order = list(range(count))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    by = (
        {prompt_id(p): 1.0 + i % 3 for i, p in enumerate(prompts["prompt"])}
        if "weights" in settings
        else None
    )
    first, second = (
        draw(p, iteration, seed, per_iteration=count // 2, by=by, **settings)
        for p in (prompts, prompts[order])
    )
    assert first.equals(second)  # the order in which a source lists its prompts does not matter
    assert first.schema == PROMPT_DRAWS
    assert first["draw_id"].n_unique() == first["seed"].n_unique() == first.height == count // 2
    for row in first.iter_rows(named=True):
        assert row["prompt_id"] == prompt_id(row["prompt"])
        assert row["seed"] == derive_seed(seed, "draw", iteration, row["prompt_id"], row["draw_index"])
    if settings["draw"] != "with_replacement":
        assert first["prompt_id"].n_unique() == first.height
        assert (first["draw_index"] == 0).all()


def test_draws_differ_by_seed_and_by_iteration() -> None:
    for settings in SETTINGS[:2]:
        drawn = [draw(table(50), k, s, per_iteration=10, **settings) for k in (1, 2) for s in (0, 1)]
        assert len({tuple(frame["prompt"]) for frame in drawn}) == 4
        assert pl.concat(drawn)["draw_id"].n_unique() == 40


def test_repeats_are_distinct_draws() -> None:
    drawn = draw(table(2), per_iteration=9, draw="with_replacement")
    assert drawn["prompt_id"].n_unique() == 2
    for _, group in drawn.group_by("prompt_id", maintain_order=True):
        assert group["draw_index"].to_list() == list(range(group.height))
    assert drawn["seed"].n_unique() == 9


def test_windows_are_disjoint_and_run_out() -> None:
    drawn = [draw(table(11), k, per_iteration=5, draw="windows")["prompt"].to_list() for k in (1, 2)]
    assert len({*drawn[0], *drawn[1]}) == 10
    with pytest.raises(SettingsError) as caught:
        draw(table(11), 3, per_iteration=5, draw="windows")
    assert str(caught.value) == (
        "prompts.per_iteration: 5 prompts requested in iteration 3, but windows can draw 1 of 11; lower it or add prompts"
    )
    with pytest.raises(SettingsError, match="can draw 0 of 11"):
        draw(table(11), 9, per_iteration=5, draw="windows")


def test_cannot_draw_more_prompts_than_exist() -> None:
    assert draw(table(5), per_iteration=5)["prompt"].n_unique() == 5
    with pytest.raises(
        SettingsError, match="6 prompts requested in iteration 1, but without_replacement can draw 5 of 5"
    ):
        draw(table(5), per_iteration=6)


def weights(*values: float) -> dict[str, float]:
    return {prompt_id(f"prompt {i}"): value for i, value in enumerate(values)}


def test_weighted_draws_take_only_prompts_with_weight() -> None:
    drawn = draw(table(5), per_iteration=2, draw="weighted", weights="q", by=weights(0, 3, 0, 0.5))
    assert set(drawn["prompt"]) == {"prompt 1", "prompt 3"}
    assert dict(drawn.select("prompt", "weight").rows()) == {"prompt 1": 3.0, "prompt 3": 0.5}
    with pytest.raises(SettingsError, match="weighted can draw 2 of 5"):
        draw(table(5), per_iteration=3, draw="weighted", weights="q", by=weights(0, 3, 0, 0.5))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(
        SettingsError, match=r"prompts\.weights: the query returns a negative or non-finite weight"
    ):
        draw(table(5), per_iteration=1, draw="weighted", weights="q", by=weights(1, value))


def test_weighted_draws_have_the_frequencies_of_successive_sampling() -> None:
    """Two of {1, 2, 3} drawn one after the other without replacement, in proportion to weight.

    By hand: P(3 is drawn) = 3/6 + 2/6 * 3/4 + 1/6 * 3/5 = 0.85; for 2: 2/6 + 3/6 * 2/3 + 1/6 * 2/5 = 0.7333;
    for 1: 2 - 0.85 - 0.7333 = 0.4167.
    """
    by = weights(1, 2, 3)
    n = 2000
    drawn = pl.concat(
        draw(table(3), k, per_iteration=2, draw="weighted", weights="q", by=by) for k in range(1, n + 1)
    )
    share = dict(drawn.group_by("prompt").agg(pl.len() / n).rows())
    for prompt, expected in (("prompt 0", 0.4167), ("prompt 1", 0.7333), ("prompt 2", 0.85)):
        assert abs(share[prompt] - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_unweighted_draws_are_uniform() -> None:
    n = 800
    for settings, expected in ((SETTINGS[0], 0.4), (SETTINGS[1], 0.4)):
        drawn = pl.concat(draw(table(5), k, per_iteration=2, **settings) for k in range(1, n + 1))
        for _, share in drawn.group_by("prompt").agg(pl.len() / n).rows():
            assert abs(share - expected) < 0.08


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_path_with_brackets_is_not_a_glob_pattern(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"prompts[v2]*.{kind}"
    frame = pl.DataFrame({"prompt": ["a"]})
    frame.write_csv(path) if kind == "csv" else frame.write_parquet(path)
    assert read_prompt_file(path)["prompt"].to_list() == ["a"]
