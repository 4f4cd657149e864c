"""Structured output of a real vLLM engine on the CPU: completions, log-probabilities, and what is refused."""

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

pytestmark = pytest.mark.usefixtures("quick")

REQUESTS = [Request("def add(a, b):", tuple(range(8))), Request("for name in", (4, 5, 2**64 - 1))]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "grade": {"enum": [1, 2, 3]}},
    "required": ["ok", "grade"],
    "additionalProperties": False,
}
BITS = {"regex": "[01]{6}"}  # characters that no token of the tiny tokenizer combines with others


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_models.tokenizer()
    return {
        "base": vllm_models.save(root / "base", "llama", tokenizer, context=256),
        "trained": vllm_models.save(root / "trained", "llama", tokenizer, seed=1, context=256),
    }


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmSampler]:
    """One engine for the module, started once."""
    vllm_models.needed()
    with VllmSampler(threads=1, batch_size=256, structured=True) as opened:
        yield opened


def warm(structured: dict[str, Any], max_new_tokens: int = 24, **more: Any) -> Decoding:
    return Decoding(1.5, max_new_tokens=max_new_tokens, structured=structured, **more)


def flat(rows: list[list[Completion]]) -> list[Completion]:
    return [completion for row in rows for completion in row]


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"choice": ["yes", " no", 'may"be']}, r'yes| no|may"be'),
        ({"regex": "[A-C]{2,3}(x|yz)?"}, "[A-C]{2,3}(x|yz)?"),
        ({"grammar": 'root ::= "(" root ")" | "a" | "b"'}, r"\(*[ab]\)*"),
        # A special token is spelled out by ordinary tokens: the token itself has no text.
        ({"regex": r"<\|(pad|best)\|>"}, r"<\|(pad|best)\|>"),
    ],
)
def test_completions_match_their_constraint(
    folders: dict[str, Path], engine: VllmSampler, structured: dict[str, Any], pattern: str
) -> None:
    rows = engine.generate(folders["base"], REQUESTS, warm(structured))
    assert [len(row) for row in rows] == [8, 3]
    for drawn in flat(rows):
        assert drawn.finish_reason == "stop" and drawn.n_tokens > 1, drawn
        assert re.fullmatch(pattern, drawn.text) and drawn.text.count("(") == drawn.text.count(")")
    assert len({completion.text for completion in flat(rows)}) > 1
    assert engine.generate(folders["base"], REQUESTS, warm(structured)) == rows
    # Also without the other requests, and in another order.
    (alone,) = engine.generate(folders["base"], [Request(REQUESTS[0].prompt, (3, 1))], warm(structured))
    assert [completion.text for completion in alone] == [rows[0][3].text, rows[0][1].text]


def test_json_follows_its_schema_unless_it_is_cut_off(folders: dict[str, Path], engine: VllmSampler) -> None:
    whole = flat(engine.generate(folders["base"], REQUESTS, warm({"json_schema": SCHEMA}, 200)))
    ended = [json.loads(completion.text) for completion in whole if completion.finish_reason == "stop"]
    assert len(ended) > 5
    for value in ended:
        jsonschema.validate(value, SCHEMA)
    for completion in flat(engine.generate(folders["base"], REQUESTS, warm({"json_schema": SCHEMA}, 4))):
        assert (completion.finish_reason, completion.n_tokens) == ("length", 4)
        with pytest.raises(json.JSONDecodeError):
            json.loads(completion.text)


def model_log_prob(folder: Path, prompt: str, text: str, end: tuple[int, ...]) -> float:
    """The model's log-probability of a text and an end token, without any constraint."""
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
        theirs = embedded.logprobs(folder, [(request.prompt, completion.text) for completion in row])
        for completion, (total, count) in zip(row, theirs, strict=True):
            assert completion.n_tokens == count + len(end)
            expected = model_log_prob(folder, request.prompt, completion.text, end)
            assert completion.logprob == pytest.approx(expected, abs=1e-4)
            assert expected < -10  # far from certain; it would be close to it if only the two digits counted
            if not end:
                assert completion.logprob == pytest.approx(total, abs=1e-4)


def test_logprobs_ignore_the_constraint(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    agree(engine, embedded, folders["base"], 24, (0,))
    agree(engine, embedded, folders["base"], 5, ())


def test_the_next_iterations_weights_are_swapped_in(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    engine.generate(folders["base"], REQUESTS, warm(BITS))
    before = vllm_models.process(engine)
    agree(engine, embedded, folders["trained"], 24, (0,))
    agree(engine, embedded, folders["base"], 24, (0,))  # and back
    assert vllm_models.process(engine) == before


def test_free_text_is_unaffected(
    folders: dict[str, Path], engine: VllmSampler, embedded: TransformersSampler
) -> None:
    engine.generate(folders["base"], REQUESTS, warm(BITS))
    before, greedy = vllm_models.process(engine), Decoding(0, max_new_tokens=12)
    ours, theirs = (sampler.generate(folders["base"], REQUESTS, greedy) for sampler in (engine, embedded))
    assert [(completion.text, completion.n_tokens) for completion in flat(ours)] == [
        (completion.text, completion.n_tokens) for completion in flat(theirs)
    ]
    assert [completion.logprob for completion in flat(ours)] == pytest.approx(
        [completion.logprob for completion in flat(theirs)], abs=1e-4
    )
    assert vllm_models.process(engine) == before


@pytest.mark.parametrize(
    ("structured", "message"),
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
def test_unsupported_constraints_are_reported_in_one_sentence(
    folders: dict[str, Path], engine: VllmSampler, structured: dict[str, Any], message: str
) -> None:
    engine.generate(folders["base"], REQUESTS, warm(BITS))
    before = vllm_models.process(engine)
    with pytest.raises(SamplerError, match=f"^sampling.structured: {message}"):
        engine.generate(folders["base"], REQUESTS, warm(structured, banned_tokens=("(",)))
    assert len(flat(engine.generate(folders["base"], REQUESTS, warm(BITS)))) == 11
    assert vllm_models.process(engine) == before


def test_the_embedded_engine_refuses_structured_output(
    folders: dict[str, Path], embedded: TransformersSampler
) -> None:
    with pytest.raises(
        SamplerError, match="samples free text only; for structured output choose engine vllm"
    ):
        embedded.generate(folders["base"], REQUESTS, warm(BITS))


def test_a_tokenizer_is_identified_by_its_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    """An engine keeps its grammars only for weights with the same vocabulary."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "again")
    content = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps({**content, "truncation": None}))
    assert vocabulary(tmp_path / "again") == vocabulary(folders["base"]) == vocabulary(folders["trained"])
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary(tmp_path / "again") != vocabulary(folders["base"])
