"""Packed rows match padded rows: log-probabilities, KL, gradients and whole trainings; or they are refused.

Packed rows on several processes are tested in test_zero.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.training.test_train import ADAPTIVE
from tests.training.tiny import write_job
from textalign_dagster.cli.preflight import _packing
from textalign_dagster.settings import SettingsError
from training.data import packing
from training.data.batches import Collator
from training.data.examples import Example
from training.forward import labelled_tokens
from training.job import JobError
from training.objectives import nll as objectives
from training.train import main

SINGLE, DOUBLE = torch.float32, torch.float64
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
LLAMA = SMALL | {"intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    # The settings of each architecture, and whether its attention runs row by row.
    "llama": (LLAMA, True),
    "mistral": (LLAMA | {"sliding_window": 4}, True),  # rows are longer than the window
    "gemma3_text": (LLAMA | {"head_dim": 4, "sliding_window": 4}, True),  # full and windowed layers
    "gpt2": (GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "gptj": (GPT2 | {"rotary_dim": 2}, False),
    "gpt_neox": (SMALL | {"intermediate_size": 32, "max_position_embeddings": 32}, True),
    "mixtral": (LLAMA | {"num_local_experts": 2}, True),
}
EXAMPLES = [
    Example([5, 6, 7], [8, 9, 10, 11, 12], 0.7, reference=[7]),
    Example([4], [3], 1.9, reference=[4]),
    Example([20, 21, 22, 23, 24, 25, 26, 27], [28, 29, 30], 0.4, reference=[20, 27]),
    Example([1, 2], [38, 39, 38, 39, 38, 39, 38, 39, 37], 1.0, reference=[1, 2]),
]


def make(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **KINDS[kind][0], initializer_range=0.3)
    # Experts are not computed in double precision.
    return AutoModelForCausalLM.from_config(config).to(SINGLE if kind == "mixtral" else DOUBLE).eval()


def step(
    model: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Log-probabilities, loss, KL and the gradient of every weight."""
    model.zero_grad()
    outputs = labelled_tokens(model, batch, "")
    with torch.no_grad():
        reference_log_probs = labelled_tokens(reference, batch, "reference_").log_probs
    loss = objectives.conditional_mle(
        outputs, batch["weights"], entropy_coef=0.06, kl_coef=0.5, reference=reference_log_probs
    )
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "log_probs": outputs.log_probs.detach(),
        "targets": outputs.targets,
        "rows": outputs.rows,
        "reference": reference_log_probs,
        "total": loss.total.detach(),
        "kl": loss.parts["kl"],
        **gradients,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_match_padded_rows(kind: str) -> None:
    model, reference = make(kind), make(kind, seed=1)
    padded = step(model, reference, Collator(pad=0)(EXAMPLES))
    assert packing.prepare(model, "m") is packing.prepare(reference, "m") is KINDS[kind][1]
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        packed = step(model, reference, Collator(pad=0, packed=True)(EXAMPLES))
        assert packed.keys() == padded.keys()
        # Norms and rotations are computed in single precision in most architectures.
        tolerance = 1e-10 if kind == "gpt2" else 1e-5
        for name, expected in padded.items():
            assert torch.allclose(packed[name], expected, rtol=tolerance, atol=tolerance), name


def test_one_row_and_a_row_of_one_token() -> None:
    model = make("gpt2")
    packing.prepare(model, "m")
    for examples in (EXAMPLES[:1], [Example([], [3, 4], 1.0), Example([], [5], 1.0), EXAMPLES[1]]):
        padded, packed = (Collator(pad=0, packed=p)(examples) for p in (False, True))
        expected, actual = (labelled_tokens(model, batch, "") for batch in (padded, packed))
        assert torch.allclose(actual.log_probs, expected.log_probs, atol=1e-12)
        assert torch.equal(actual.targets, expected.targets) and torch.equal(actual.rows, expected.rows)
        assert packed["counted"].tolist() == torch.bincount(actual.rows, minlength=len(examples)).tolist()
        assert torch.equal(padded["counted"], packed["counted"]) and padded["tokens"] == packed["tokens"]


def test_packed_rows_by_hand() -> None:
    batch = Collator(pad=0, packed=True)([Example([5, 6], [7, 8], 2.0), Example([9], [10], 0.5)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["row_starts"] == [0, 4, 6]
    assert batch["targets"].tolist() == [7, 8, 10]
    assert batch["predicts"].tolist() == [1, 2, 4]
    assert batch["rows"].tolist() == [0, 0, 1]
    assert batch["counted"].tolist() == [2, 1] and batch["tokens"] == 6
    assert "reference_input_ids" not in batch and "attention_mask" not in batch


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        # These accept positions silently, and build a mask of one row themselves.
        ("bloom", {"n_layer": 2, "n_head": 4}, "a row sees the row before it"),
        ("opt", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}, "a row sees the row before it"),
        ("mamba", {"num_hidden_layers": 2, "state_size": 4}, "a row sees the row before it"),
        ("llama", LLAMA | {"attention_chunk_size": 8}, "its attention is cut into chunks"),
    ],
)
def test_unsupported_architectures_are_refused(kind: str, settings: dict[str, Any], why: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"hidden_size": 16, "vocab_size": 40, **settings})
    with pytest.raises(
        JobError, match=rf"training.packing: m: a \w+ does not read .*({why}).*; set it to false"
    ):
        packing.prepare(AutoModelForCausalLM.from_config(config), "m")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_attention_across_rows_is_detected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Like a version of transformers that ignores the positions and treats packed rows as one row.
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(JobError, match="a row sees the row before it"):
        packing.prepare(make(kind).float(), "m")


def test_positions_that_do_not_restart_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2").float()
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: embed(torch.arange(ids.shape[1])[None]))
    with pytest.raises(JobError, match="its positions do not restart"):
        packing.prepare(model, "m")


def train(
    folder: Path, job: dict[str, Any], name: str, **settings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the done marker, and the weights."""
    job = job | {"out": str(folder / name), "training": job["training"] | settings}
    assert main([str(write_job(folder, job))]) == 0
    out = folder / name
    return json.loads((out / "done.json").read_text()), load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    "changes", [{}, {"lora": {"rank": 2, "alpha": 4.0}}, {"gradient_checkpointing": True}]
)
def test_packed_training_matches_the_padded_one(
    tmp_path: Path, job: dict[str, Any], policy: Path, changes: dict[str, Any]
) -> None:
    if "lora" in changes:
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
    job |= {"reference": str(policy), "special_tokens": ["<|best|>"]}
    job["training"] |= {"objective": ADAPTIVE} | changes
    padded, weights = train(tmp_path, job, "padded")
    packed, others = train(tmp_path, job, "packed", packing=True)
    assert packed["losses"] == pytest.approx(padded["losses"], abs=1e-4)
    assert packed["coefficients"] == pytest.approx(padded["coefficients"], rel=1e-5)
    assert packed["tokens"] == padded["tokens"]
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], atol=2e-3), name
    # Packing leaves no trace in the saved policy.
    configs = [(tmp_path / name / "config.json").read_text() for name in ("padded", "packed")]
    assert configs[0] == configs[1]


def test_policy_without_packing_support_is_refused_before_training(
    tmp_path: Path, job: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    job |= {"policy": str(folder)}
    job["training"] |= {"packing": True}
    assert main([str(write_job(tmp_path, job))]) == 1
    message = f"training.packing: {folder}: a BloomForCausalLM does not read"
    assert f"error: {message}" in capsys.readouterr().err
    # The same error is raised before an iteration starts.
    with pytest.raises(SettingsError, match=re.escape(message)):
        _packing(folder)
    assert packing.refusal(str(policy)) is None
