"""From rows to tokens to batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.tiny import make_rows, make_tokenizer
from textalign_dagster.tokenisation import encode_prompts
from training.data.batches import Collator, Examples, plan_batches
from training.data.examples import Example, encode, ends, read_rows
from training.job import Job, JobError
from training.objectives.tokens import IGNORE

TEMPLATE = "feedback: {condition} input: {prompt}"
TOKENIZER = make_tokenizer()


def make_job(max_new_tokens: int | None = None, **training: Any) -> Job:
    return Job(
        max_new_tokens=max_new_tokens,
        rows="rows.parquet",
        policy="policy",
        out="out",
        template=TEMPLATE,
        training={"learning_rate": 0.1, "max_length": 64, **training},
    )  # type: ignore[arg-type]


def row(
    prompt: str = "def f(a):",
    text: str = "\n    return a\n",
    condition: str | None = "good",
    finish_reason: str = "stop",
    weight: float = 1.0,
) -> pl.DataFrame:
    return make_rows(1).with_columns(
        prompt=pl.lit(prompt),
        text=pl.lit(text),
        condition=pl.lit(condition, pl.String),
        finish_reason=pl.lit(finish_reason),
        weight=pl.lit(weight),
    )


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_prompt_and_text_are_tokenized_separately() -> None:
    [example] = encode(row(), TOKENIZER, make_job())
    assert example.prompt == ids("feedback: good input: def f(a):")
    assert example.text == [*ids("\n    return a\n"), TOKENIZER.eos_token_id]
    assert example.reference is None


def test_without_a_condition_the_prompt_is_plain() -> None:
    [example] = encode(row(condition=None), TOKENIZER, make_job())
    assert example.prompt == ids("def f(a):")


def test_reference_sees_the_plain_prompt() -> None:
    [example] = encode(row(), TOKENIZER, make_job(objective={"kl_coef": 0.1}))
    assert example.reference == ids("def f(a):")
    [example] = encode(
        row(), TOKENIZER, make_job(objective={"kl_coef": 0.1, "kl_reference_sees_condition": True})
    )
    assert example.reference is None


def test_truncated_text_gets_no_end_token() -> None:
    [example] = encode(row(finish_reason="length"), TOKENIZER, make_job())
    assert example.text == ids("\n    return a\n")


@pytest.mark.parametrize(
    ("text", "n_tokens", "expected"),
    [
        ("cut off here", 64, False),
        ("cut off here", 63, True),
        ("The end.", 64, True),
        ("The end? \n", 64, True),
        ("The end!", 64, True),
        ("(The end.)", 64, False),
    ],
)
def test_legacy_end_rule(text: str, n_tokens: int, expected: bool) -> None:
    assert ends(text, n_tokens, "length", "legacy", 64) is expected


def test_legacy_rule_counts_the_encoded_text() -> None:
    [example] = encode(
        row(finish_reason="stop"),
        TOKENIZER,
        make_job(eos_rule="legacy", max_new_tokens=len(ids("\n    return a\n"))),
    )
    assert example.text[-1] != TOKENIZER.eos_token_id


def test_special_tokens_spelled_out_in_a_text_are_plain_text() -> None:
    [example] = encode(row(text="<|end|> and on", finish_reason="length"), TOKENIZER, make_job())
    assert TOKENIZER.eos_token_id not in example.text
    assert TOKENIZER.decode(example.text) == "<|end|> and on"


@pytest.mark.parametrize("prompt", ["def f(a):", "{bos}def f(a):"])
def test_training_encodes_prompts_as_sampling_does(prompt: str) -> None:
    # A chat template writes the BOS token itself; it must not appear twice.
    tokenizer = make_tokenizer(bos=True)
    text = prompt.replace("{bos}", tokenizer.bos_token)
    [example] = encode(row(prompt=text, condition=None), tokenizer, make_job())
    assert [example.prompt] == encode_prompts(tokenizer, [text])
    assert example.prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("bos", [False, True])
def test_long_prompt_is_truncated_at_its_beginning(bos: bool) -> None:
    tokenizer = make_tokenizer(bos)
    prompt = "# " + "é x y z " * 40 + "TL;DR:"
    [example] = encode(row(prompt=prompt), tokenizer, make_job(max_length=40))
    assert example.length <= 40
    decoded = tokenizer.decode(example.prompt)
    assert decoded.removeprefix("<|start|>").startswith("feedback: good input: ")
    assert decoded.endswith("z TL;DR:")
    assert (example.prompt[0] == tokenizer.bos_token_id) is bos
    assert tokenizer.decode(example.text) == "\n    return a\n<|end|>"


def test_text_that_cannot_fit_raises_an_error_with_its_sample() -> None:
    with pytest.raises(JobError, match=r"rows.parquet: sample s0: .* raise max_length"):
        encode(row(text="x" * 200), TOKENIZER, make_job(max_length=40))


def test_empty_prompt_raises_an_error_without_a_bos_token() -> None:
    with pytest.raises(JobError, match="sample s0: the prompt is empty"):
        encode(row(prompt="", condition=None), TOKENIZER, make_job())
    [example] = encode(row(prompt="", condition=None), make_tokenizer(bos=True), make_job())
    assert example.prompt == [2]


def test_rows_without_any_token_are_left_out() -> None:
    empty = row(text="", finish_reason="length")
    assert len(encode(pl.concat([empty, row()]), TOKENIZER, make_job())) == 1
    with pytest.raises(JobError, match="empty in all 1 rows"):
        encode(empty, TOKENIZER, make_job())
    [stopped] = encode(row(text=""), TOKENIZER, make_job())
    assert stopped.text == [TOKENIZER.eos_token_id]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop("weight", "text"), r"missing columns \['text', 'weight'\]"),
        (lambda f: f.clear(), "no rows"),
        (
            lambda f: f.with_columns(text=pl.lit(None, pl.String)),
            "text: is NULL.*in 3 of 3 rows, first in sample s0",
        ),
        (
            lambda f: f.with_columns(weight=pl.lit(float("nan"))),
            "weight: is negative or not a number",
        ),
        (lambda f: f.with_columns(weight=pl.lit(-1.0)), "weight: is negative"),
        (lambda f: f.with_columns(weight=pl.lit(0.0)), "weight: 0 in all 3 rows"),
        (lambda f: f.with_columns(finish_reason=pl.lit("eos")), "finish_reason: is neither"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "rows.parquet"
    change(make_rows(3)).write_parquet(path)
    with pytest.raises(JobError, match=message) as error:
        read_rows(path, TEMPLATE)
    assert str(path) in str(error.value)


def test_condition_requires_a_template(tmp_path: Path) -> None:
    make_rows(3).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(JobError, match="no template"):
        read_rows(tmp_path / "rows.parquet", None)


def test_rows_that_are_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("a,b")
    with pytest.raises(JobError, match="cannot be read as Parquet"):
        read_rows(tmp_path / "rows.parquet", None)


def test_rows_of_weight_0_are_left_out(tmp_path: Path) -> None:
    make_rows(4).with_columns(weight=pl.Series([0.0, 1.0, 0.0, 2.0])).write_parquet(tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet", TEMPLATE)["sample_id"].to_list() == ["s1", "s3"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_every_epoch_visits_every_row_once(
    lengths: list[int], batch_size: int, accumulation: int, world_size: int, epochs: int, seed: int
) -> None:
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "accumulation": accumulation,
        "world_size": world_size,
        "seed": seed,
    }
    plan = plan_batches(lengths, epochs=epochs, **options)
    assert all(len(step) == accumulation and all(len(micro) == world_size for micro in step) for step in plan)
    batches = [batch for step in plan for micro in step for batch in micro]
    assert all(1 <= len(batch) <= batch_size and (-1 not in batch or batch == [-1]) for batch in batches)
    counts = Counter(row for batch in batches for row in batch if row != -1)
    assert counts == dict.fromkeys(range(len(lengths)), epochs)
    assert plan == plan_batches(lengths, epochs=epochs, **options)


def test_steps_do_not_depend_on_how_they_are_split() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(100)]

    def steps(batch_size: int, accumulation: int, world_size: int) -> list[set[int]]:
        plan = plan_batches(
            lengths,
            batch_size=batch_size,
            accumulation=accumulation,
            world_size=world_size,
            epochs=2,
            seed=3,
        )
        return [{row for micro in step for batch in micro for row in batch} - {-1} for step in plan]

    assert steps(8, 1, 1) == steps(2, 2, 2) == steps(1, 8, 1)


def test_seed_and_epoch_change_the_order() -> None:
    def plan(seed: int, epochs: float = 1) -> list[Any]:
        return plan_batches(
            list(range(64)), batch_size=4, accumulation=1, world_size=1, epochs=epochs, seed=seed
        )

    assert plan(0) != plan(1)
    assert plan(0, 2)[:16] == plan(0) != plan(0, 2)[16:]


def test_half_an_epoch() -> None:
    assert len(plan_batches([5] * 64, batch_size=4, accumulation=1, world_size=1, epochs=1.5, seed=0)) == 24
    assert len(plan_batches([5] * 64, batch_size=4, accumulation=1, world_size=1, epochs=0.5, seed=0)) == 8


def test_rows_of_a_batch_have_similar_lengths() -> None:
    lengths = [(37 * i) % 101 + 1 for i in range(512)]
    plan = plan_batches(lengths, batch_size=8, accumulation=1, world_size=1, epochs=1, seed=0)
    padded = sum(max(lengths[r] for r in micro[0]) * len(micro[0]) for step in plan for micro in step)
    assert padded < 1.2 * sum(lengths)
    firsts = [lengths[step[0][0][0]] for step in plan]
    assert firsts != sorted(firsts)  # no curriculum


def test_collator() -> None:
    examples = Examples(
        [Example([5, 6, 7], [8, 9], 2.0, reference=[6]), Example([5], [8], 0.5, reference=[5])]
    )
    batch = Collator(pad=1)([examples[0], examples[1], examples[-1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 8, 1, 1, 1], [5, 6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1] * 5]
    assert batch["labels"][:2].tolist() == [
        [IGNORE, IGNORE, IGNORE, 8, 9],
        [IGNORE, 8, IGNORE, IGNORE, IGNORE],
    ]
    assert batch["weights"].tolist() == [2.0, 0.5, 0.0]
    assert batch["keep"] == 5  # position 0 predicts the second row's label
    assert batch["reference_input_ids"].tolist() == [[6, 8, 9], [5, 8, 1], [6, 8, 9]]
    assert batch["reference_labels"].tolist() == [
        [IGNORE, 8, 9],
        [IGNORE, 8, IGNORE],
        [IGNORE, 8, 9],
    ]
