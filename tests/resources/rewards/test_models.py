"""Classifiers and reward models: scores equal those of transformers, whatever the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTJModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import resources.rewards.models
from resources.rewards.models import worker_settings
from resources.rewards.scoring import SCORED, ScoringError, inspect_scorer, score_samples
from resources.rewards.worker import ScoringModel
from resources.workers.serving import CallError
from tests.resources.engines.tiny_models import CONTEXT, tokenizer
from tests.resources.rewards import tiny_scorers
from textalign_dagster.scorers import ClassifierScorer, ModelScorer, RewardModelScorer
from textalign_dagster.settings import SettingsError, validate

pytestmark = pytest.mark.usefixtures("quick")

PAIRS = [
    ("def add(a, b):", "\n    return a + b"),
    ("for name in names:", " print(name)"),
    ("class Thing:", "\n    value = 3  # a number\n    other = value"),
    ("x", "y"),
    ("for name in", ""),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scorers")
    return {
        "gpt2": tiny_scorers.classifier(root / "gpt2", "gpt2"),
        "llama": tiny_scorers.classifier(root / "llama", "llama"),
        "no_padding": tiny_scorers.classifier(root / "no_padding", "llama", pad=None),
        "bert": tiny_scorers.classifier(root / "bert", "bert", labels=("neutral", "toxic", "obscene")),
        "gptj": tiny_scorers.last_token(root / "gptj"),
        "gptj_bin": tiny_scorers.last_token(root / "gptj_bin", safe=False),
    }


def scored(scorer: ModelScorer, pairs: list[tuple[str, str]] = PAIRS) -> list[Any]:
    """Scores and reasons, without a worker."""
    settings = worker_settings(scorer)
    return ScoringModel(settings, "cpu").score(pairs, lambda done: None)


def numbers(scorer: ModelScorer, pairs: list[tuple[str, str]] = PAIRS) -> list[float]:
    return [score for score, _ in scored(scorer, pairs)]


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    """The logits of one input, computed by transformers itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "no_padding"])
def test_rewards_equal_those_of_transformers_one_by_one(folders: dict[str, Path], kind: str) -> None:
    words = tokenizer()
    expected = [
        float(logits_of(folders[kind], words(p)["input_ids"] + words(t)["input_ids"])[0]) for p, t in PAIRS
    ]
    assert len({round(x, 3) for x in expected}) == len(PAIRS)  # the model tells them apart
    batched = numbers(RewardModelScorer(model=str(folders[kind])))
    one_by_one = numbers(RewardModelScorer(model=str(folders[kind]), batch_tokens=1))
    assert batched == pytest.approx(expected, abs=1e-5)
    assert one_by_one == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_classifiers_equal_transformers(folders: dict[str, Path], activation: Any) -> None:
    function: Callable[[torch.Tensor], torch.Tensor] = {
        "softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}[activation]  # fmt: skip
    words = tokenizer()
    texts = [("never shown", text) for _, text in PAIRS[:4]]
    expected = [float(function(logits_of(folders["bert"], words(t)["input_ids"]))[1]) for _, t in texts]
    scorer = ClassifierScorer(model=str(folders["bert"]), label="toxic", activation=activation, good=False)
    bare = [("", text) for _, text in texts]  # what score_samples passes to a scorer that reads only texts
    assert numbers(scorer, bare) == pytest.approx(expected, abs=1e-5)
    by_index = ClassifierScorer(model=str(folders["bert"]), label=1, activation=activation, good=False)
    assert numbers(by_index, bare) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["gptj", "gptj_bin"])
def test_last_token_rewards_equal_the_published_computation(folders: dict[str, Path], kind: str) -> None:
    folder, words = folders[kind], AutoTokenizer.from_pretrained(folders[kind])
    state = load_file(folders["gptj"] / "model.safetensors")
    body = GPTJModel(AutoConfig.from_pretrained(folder)).eval()
    body.load_state_dict(
        {
            name.removeprefix("transformer."): tensor
            for name, tensor in state.items()
            if not name.endswith(("attn.bias", "attn.masked_bias")) and name != "v_head.weight"
        }
    )
    expected = []
    template = "<|startoftext|>{prompt}\nTL;DR: {text}<|end|>"
    for prompt, text in PAIRS[:4]:
        shown = f"<|startoftext|>{prompt.strip()}\nTL;DR: {text.strip()}<|end|>"
        ids = words(shown)["input_ids"] + [words.eos_token_id] * 3  # padded with the end token, as published
        with torch.no_grad():
            hidden = body(input_ids=torch.tensor([ids]))[0][0]
        rewards = hidden @ state["v_head.weight"][0]
        expected.append(float(rewards[ids.index(words.eos_token_id) - 1]))
    scorer = RewardModelScorer(model=str(folder), head="gptj_last_token", template=template)
    assert numbers(scorer, PAIRS[:4]) == pytest.approx(expected, abs=1e-4)
    unbatched = scorer.model_copy(update={"batch_tokens": 1})
    assert numbers(unbatched, PAIRS[:4]) == pytest.approx(expected, abs=1e-4)
    # The template adds the cue, so it is removed from the prompt.
    cued = scorer.model_copy(update={"cue": "TL;DR:"})
    with_cue = [(f"{prompt}\nTL;DR:", text) for prompt, text in PAIRS[:4]]
    assert numbers(cued, with_cue) == pytest.approx(expected, abs=1e-4)


def test_the_published_template_is_the_default_of_the_published_head() -> None:
    scorer = RewardModelScorer(model="/m", head="gptj_last_token")
    assert scorer.shown_template == "<|startoftext|>{prompt}\nTL;DR: {text}<|endoftext|>"
    assert scorer.shown_cue == "TL;DR:"
    assert RewardModelScorer(model="/m").shown_template is None


def test_inputs_that_are_too_long_fail_or_lose_their_prompt(folders: dict[str, Path]) -> None:
    long = [("a b " * 100 + "cue:", " print(name)"), ("a", "b c " * 100)]
    (score, _), (none, reason) = scored(RewardModelScorer(model=str(folders["llama"])), long)
    assert score is not None and none is None and f"(of {CONTEXT} in all)" in reason
    _, (cut, _) = scored(RewardModelScorer(model=str(folders["llama"]), allow_truncated_text=True), long)
    assert cut is not None
    with pytest.raises(CallError, match=f"holds {CONTEXT} tokens; lower it"):
        scored(RewardModelScorer(model=str(folders["llama"]), max_length=CONTEXT + 1))


@pytest.mark.parametrize("harm", ["missing", "left over", "shape", "no head"])
def test_weights_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path, harm: str) -> None:
    state = load_file(folders["gptj"] / "model.safetensors")
    if harm == "missing":
        del state["transformer.h.1.mlp.fc_in.weight"]
    elif harm == "left over":
        state["transformer.h.2.ln_1.weight"] = torch.ones(32)
    elif harm == "shape":
        state["transformer.wte.weight"] = torch.ones(10, 32)
    else:
        del state["v_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    scorer = RewardModelScorer(model=str(folders["gptj"]), head="gptj_last_token", weights=str(tmp_path))
    with pytest.raises(CallError, match=r"does not fit|no v_head"):
        scored(scorer)


def test_files_that_would_run_code_are_not_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"v_head.weight": torch.ones(1, 32), "callable": Path}, tmp_path / "pytorch_model.bin")
    scorer = RewardModelScorer(model=str(folders["gptj"]), head="gptj_last_token", weights=str(tmp_path))
    with pytest.raises(CallError, match=r"holds more than tensors.*safetensors"):
        scored(scorer)


def test_models_that_do_not_fit_their_settings_are_refused(folders: dict[str, Path]) -> None:
    toxic = ClassifierScorer(model=str(folders["bert"]), label="rude", good=False)
    with pytest.raises(CallError, match="no label 'rude'; one of: neutral, toxic, obscene"):
        scored(toxic)
    with pytest.raises(CallError, match="no output 7"):
        scored(toxic.model_copy(update={"label": 7}))
    with pytest.raises(CallError, match="set `label` to the one that is the reward"):
        scored(RewardModelScorer(model=str(folders["bert"])))
    with pytest.raises(CallError, match=r"cannot be loaded as a sequence classifier|lacks"):
        scored(RewardModelScorer(model=str(folders["gptj"])))


# Through the worker


def samples(pairs: list[tuple[str, str]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(len(pairs))],
            "prompt": [prompt for prompt, _ in pairs],
            "reference": pl.Series([None] * len(pairs), dtype=pl.String),
            "text": [text for _, text in pairs],
            "finish_reason": ["stop"] * len(pairs),
        }
    )


def test_samples_are_scored_in_a_worker_that_passes_its_check(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    scorer = RewardModelScorer(model=str(folders["llama"]))
    expected = numbers(scorer)
    fixture = tmp_path / "pairs.jsonl"
    # One prompt for all, so that only the model's ranking of the texts matters; the last pair is wrong.
    texts = [text for _, text in PAIRS[:4]]
    by_text = numbers(scorer, [("p", text) for text in texts])
    order = sorted(range(4), key=lambda i: by_text[i])
    lines = [(order[3], order[0]), (order[2], order[1]), (order[1], order[0]), (order[0], order[3])]
    fixture.write_text(
        "".join(
            json.dumps({"prompt": "p", "chosen": texts[good], "rejected": texts[bad]}) + "\n"
            for good, bad in lines
        )
    )
    checked = RewardModelScorer.model_validate(
        {**scorer.model_dump(), "check": {"path": str(fixture), "min_accuracy": 0.7}}
    )
    facts: dict[str, Any] = {}
    seen: list[tuple[int, int]] = []
    twice = [*PAIRS, PAIRS[0]]
    rows = score_samples(checked, samples(twice), lambda *step: seen.append(step[:2]), facts=facts)
    assert rows.schema == SCORED and rows["sample_id"].to_list() == [f"s{i}" for i in range(6)]
    assert rows["score"].to_list() == pytest.approx([*expected, expected[0]], abs=1e-5)
    assert rows["value"].to_list() == rows["score"].to_list()
    assert facts["check_accuracy"] == 0.75 and seen[-1] == (5, 5)  # a repeated sample is scored once


class InProcessChannel:
    """A channel whose worker is this process: starting a real one takes many seconds."""

    ready = None

    def __init__(self, module: str, settings: dict[str, Any], **options: Any) -> None:
        self.model = ScoringModel(settings, "cpu")

    def call(self, call: dict[str, Any], progress: Any = None) -> Any:
        return self.model.score(call["pairs"], lambda done: None)

    def close(self) -> None:
        pass


def test_a_model_that_fails_its_check_is_not_trusted(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.rewards.models, "Channel", InProcessChannel)
    good = numbers(RewardModelScorer(model=str(folders["llama"])), [("p", "value"), ("p", "print")])
    better, worse = ("value", "print") if good[0] > good[1] else ("print", "value")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": worse, "rejected": better}) + "\n")
    check = {"path": str(path), "min_accuracy": 0.7}
    scorer = RewardModelScorer.model_validate({"model": str(folders["llama"]), "check": check})
    with pytest.raises(ScoringError, match=r"0 of 1 pairs.*0\.00.*not trusted"):
        score_samples(scorer, samples(PAIRS), lambda *_: None)
    assert "1 pairs" in inspect_scorer(scorer)


def test_toxic_is_lower_and_blank_texts_are_skipped(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.rewards.models, "Channel", InProcessChannel)
    scorer = ClassifierScorer(model=str(folders["bert"]), label="toxic", good=False)
    rows = score_samples(scorer, samples([("p", "print"), ("p", " \n"), ("p", "a " * 200)]), lambda *_: None)
    assert rows["status"].to_list() == ["ok", "skipped", "failed"]
    assert rows["value"][0] == pytest.approx(1 - rows["score"][0])
    assert rows["score"][1:].to_list() == rows["value"][1:].to_list() == [None, None]
    assert "blank" in rows["reason"][1] and "allow_truncated_text" in rows["reason"][2]


def test_missing_models_are_reported(tmp_path: Path) -> None:
    missing = RewardModelScorer(model=str(tmp_path / "none"))
    assert missing.identity["model"] is None
    with pytest.raises(ScoringError, match=r"scorer reward_model: model: .*: no such folder"):
        score_samples(missing, samples(PAIRS), lambda *_: None)
    with pytest.raises(ScoringError, match="is neither a folder nor a hub id"):
        score_samples(RewardModelScorer(model="nothing"), samples(PAIRS), lambda *_: None)


def test_a_hub_model_is_read_from_the_hubs_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own folder layout, without the hub: refs name a commit, snapshots hold its files."""
    import huggingface_hub.constants

    cache, commit = tmp_path / "models--someone--judge", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folders["gptj_bin"], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    scorer = RewardModelScorer(model="someone/judge", head="gptj_last_token")
    settings = worker_settings(scorer)
    assert settings["folder"] == settings["weights_folder"] == str(cache / "snapshots" / commit)
    assert str(cache) in inspect_scorer(scorer) and "not checked" in inspect_scorer(scorer)
    assert numbers(scorer) == pytest.approx(
        numbers(RewardModelScorer(model=str(folders["gptj"]), head="gptj_last_token")), abs=1e-4
    )
    with pytest.raises(
        SettingsError, match=r"evaluation\.scorer: .*someone/else cannot be loaded from the hub"
    ):
        inspect_scorer(RewardModelScorer(model="someone/else"), "evaluation.scorer")


def test_positions_that_do_not_start_at_zero_are_accounted_for(tmp_path: Path) -> None:
    """RoBERTa's positions start after its padding id, so two of them are never used."""
    config = RobertaConfig(
        vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=CONTEXT + 2, pad_token_id=1, num_labels=1)  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    long = [("", "a b c " * 60)]
    scorer = RewardModelScorer(model=str(tmp_path), allow_truncated_text=True)
    assert scored(scorer, long)[0][0] is not None
    with pytest.raises(CallError, match=f"holds {CONTEXT} tokens"):
        scored(scorer.model_copy(update={"max_length": CONTEXT + 1}), long)


# Identity and settings


def test_identity_depends_on_what_determines_the_scores(folders: dict[str, Path], tmp_path: Path) -> None:
    scorer = RewardModelScorer(model=str(folders["gpt2"]))
    same = RewardModelScorer(model=str(folders["gpt2"]), device="cuda", batch_tokens=7)
    assert scorer.identity == same.identity and scorer.version == same.version
    json.dumps(scorer.identity)
    copy = tiny_scorers.classifier(tmp_path / "copy", "gpt2")
    assert RewardModelScorer(model=str(copy)).identity == scorer.identity  # content, not location
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "note": 1}))
    assert RewardModelScorer(model=str(copy)).identity != scorer.identity
    hub = RewardModelScorer(model="owner/model", revision="abc")
    assert hub.identity["model"] == "owner/model" and hub.identity["model_revision"] == "abc"
    assert hub.version != RewardModelScorer(model="owner/model", revision="abd").version


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (RewardModelScorer, {"template": "{prompt}"}, "needs {text} once"),
        (RewardModelScorer, {"template": "{text} {prompt}"}, "text before the prompt"),
        (RewardModelScorer, {"template": "say {text}"}, "no {prompt}"),
        (RewardModelScorer, {"cue": "TL;DR:"}, "only a template adds it back"),
        (RewardModelScorer, {"weights": "a/b"}, "only head gptj_last_token"),
        (RewardModelScorer, {"head": "gptj_last_token", "label": 0}, "one output"),
        (ClassifierScorer, {"label": "toxic", "good": False, "template": "chat"}, "reads: prompt_and_text"),
        (ClassifierScorer, {"label": "toxic"}, "good: missing"),
        (ClassifierScorer, {"label": "t", "good": True, "activation": "relu"}, "'relu' is not allowed"),
    ],
)
def test_impossible_settings_are_refused(kind: Any, content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        validate(kind, {"model": "/m", **content}, "here")
    assert message in str(error.value)
