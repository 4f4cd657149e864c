"""Structured output of a real vLLM engine on the CPU: what comes, how likely it was, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from resources.engines.sampler import Completion, Decoding, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.engines.vllm.sampler import VllmSampler, vocabulary
from tests.resources.engines import tiny_models, vllm_models

pytestmark = pytest.mark.usefixtures("forked_workers")

REQUESTS = [Request("def add(a, b):", tuple(range(8))), Request("for name in", (4, 5, 2**64 - 1))]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "grade": {"enum": [1, 2, 3]}},
    "required": ["ok", "grade"],
    "additionalProperties": False,
}
BITS = {"regex": "[01]{6}"}  # characters that no token of the tiny tokenizer joins with others


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_models.tokenizer()
    return {
        "base": vllm_models.save(root / "base", "llama", tokenizer, context=256),
        "trained": vllm_models.save(root / "trained", "llama", tokenizer, seed=1, context=256),
    }


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmSampler]:
    """One engine for the module, which starts once."""
    vllm_models.needed()
    with VllmSampler(threads=1, batch_size=256, structured=True) as opened:
        yield opened


def warm(structured: dict[str, Any], max_new_tokens: int = 24, **more: Any) -> Decoding:
    return Decoding(1.5, max_new_tokens=max_new_tokens, structured=structured, **more)


def flat(rows: list[list[Completion]]) -> list[Completion]:
    return [one for row in rows for one in row]


@pytest.mark.parametrize(
    ("structured", "all_of_it"),
    [
        ({"choice": ["yes", " no", 'may"be']}, r'yes| no|may"be'),
        ({"regex": "[A-C]{2,3}(x|yz)?"}, "[A-C]{2,3}(x|yz)?"),
        ({"grammar": 'root ::= "(" root ")" | "a" | "b"'}, r"\(*[ab]\)*"),
        # What spells a special token is written out: the token itself has no text.
        ({"regex": r"<\|(pad|best)\|>"}, r"<\|(pad|best)\|>"),
    ],
)
def test_completions_are_what_they_have_to_be(
    folders: dict[str, Path], engine: VllmSampler, structured: dict[str, Any], all_of_it: str
) -> None:
    rows = engine.generate(folders["base"], REQUESTS, warm(structured))
    assert [len(row) for row in rows] == [8, 3]
    for one in flat(rows):
        assert one.finish_reason == "stop" and one.n_tokens > 1, one
        assert re.fullmatch(all_of_it, one.text) and one.text.count("(") == one.text.count(")")
    assert len({one.text for one in flat(rows)}) > 1
    assert engine.generate(folders["base"], REQUESTS, warm(structured)) == rows
    # Also beside other requests, and in another order.
    (alone,) = engine.generate(folders["base"], [Request(REQUESTS[0].prompt, (3, 1))], warm(structured))
    assert [one.text for one in alone] == [rows[0][3].text, rows[0][1].text]


def test_json_follows_its_schema_unless_it_is_cut(folders: dict[str, Path], engine: VllmSampler) -> None:
    whole = flat(engine.generate(folders["base"], REQUESTS, warm({"json_schema": SCHEMA}, 200)))
    ended = [json.loads(one.text) for one in whole if one.finish_reason == "stop"]
    assert len(ended) > 5
    for value in ended:
        jsonschema.validate(value, SCHEMA)
    for one in flat(engine.generate(folders["base"], REQUESTS, warm({"json_schema": SCHEMA}, 4))):
        assert (one.finish_reason, one.n_tokens) == ("length", 4)
        with pytest.raises(json.JSONDecodeError):
            json.loads(one.text)


def model_says(folder: Path, prompt: str, text: str, end: tuple[int, ...]) -> float:
    """What the model finds of a text and an end token, whatever else could have come."""
    tokenizer = tiny_models.tokenizer()
    before = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([[*before, *tokenizer(text)["input_ids"], *end]])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        terms = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    return float(terms[len(before) - 1 :].sum())


def agree(
    engine: VllmSampler,
    embedded: TransformersSampler,
    folder: Path,
    max_new_tokens: int,
    end: tuple[int, ...],
) -> None:
    rows = engine.generate(folder, REQUESTS, warm(BITS, max_new_tokens))
    for request, row in zip(REQUESTS, rows, strict=True):
        theirs = embedded.logprobs(folder, [(request.prompt, one.text) for one in row])
        for one, (total, count) in zip(row, theirs, strict=True):
            assert one.n_tokens == count + len(end)
            said = model_says(folder, request.prompt, one.text, end)
            assert one.logprob == pytest.approx(said, abs=1e-4)
            assert said < -10  # far from certain, as it would be of two digits alone
            if not end:
                assert one.logprob == pytest.approx(total, abs=1e-4)


def test_logprobs_are_the_models_own(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    agree(engine, embedded, folders["base"], 24, (0,))
    agree(engine, embedded, folders["base"], 5, ())


def test_the_next_iterations_weights_take_their_place(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    engine.generate(folders["base"], REQUESTS, warm(BITS))
    before = vllm_models.process(engine)
    agree(engine, embedded, folders["trained"], 24, (0,))
    agree(engine, embedded, folders["base"], 24, (0,))  # and back
    assert vllm_models.process(engine) == before


def test_free_text_stays_what_it_is(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    engine.generate(folders["base"], REQUESTS, warm(BITS))
    before, greedy = vllm_models.process(engine), Decoding(0, max_new_tokens=12)
    ours, theirs = (one.generate(folders["base"], REQUESTS, greedy) for one in (engine, embedded))
    assert [(one.text, one.n_tokens) for one in flat(ours)] == [
        (one.text, one.n_tokens) for one in flat(theirs)
    ]
    assert [one.logprob for one in flat(ours)] == pytest.approx(
        [one.logprob for one in flat(theirs)], abs=1e-4
    )
    assert vllm_models.process(engine) == before


@pytest.mark.parametrize(
    ("structured", "says"),
    [
        ({"regex": "a(?=b)"}, "vLLM refuses it .*Lookahead is not supported"),
        (
            {"json_schema": {"type": "integer", "multipleOf": 3}},
            "vLLM refuses it .*not supported by xgrammar",
        ),
        ({"grammar": "root ::= nobody"}, "vLLM refuses it .*grammar"),
        ({"choice": ["(((", "(("]}, "vLLM cannot follow it .*banned"),
    ],
)
def test_what_vllm_cannot_do_is_one_sentence(
    folders: dict[str, Path], engine: VllmSampler, structured: dict[str, Any], says: str
) -> None:
    engine.generate(folders["base"], REQUESTS, warm(BITS))
    before = vllm_models.process(engine)
    with pytest.raises(SamplerError, match=f"^sampling.structured: {says}"):
        engine.generate(folders["base"], REQUESTS, warm(structured, banned_tokens=("(",)))
    assert len(flat(engine.generate(folders["base"], REQUESTS, warm(BITS)))) == 11
    assert vllm_models.process(engine) == before


def test_the_embedded_engine_refuses(folders: dict[str, Path], embedded: TransformersSampler) -> None:
    with pytest.raises(
        SamplerError, match="samples free text only; for structured output choose engine vllm"
    ):
        embedded.generate(folders["base"], REQUESTS, warm(BITS))


def test_a_tokenizer_is_known_by_what_its_tokens_say(folders: dict[str, Path], tmp_path: Path) -> None:
    """An engine keeps its grammars for the next weights, and for those only."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "again")
    told = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps({**told, "truncation": None}))
    assert vocabulary(tmp_path / "again") == vocabulary(folders["base"]) == vocabulary(folders["trained"])
    words = told["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(told))
    assert vocabulary(tmp_path / "again") != vocabulary(folders["base"])
