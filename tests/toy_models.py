"""Toy-sized stand-ins for the models of the shipped experiments: random weights, with their own tokenizer.

Their context is as long as that of the models they stand in for, so prompts need no other settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.toy import PROJECT, ToyModels

CONTEXT = 2048


def save_toy_models(folder: Path) -> ToyModels:
    """A language model, a classifier (label `toxic`) and a reward model with a head on a GPT-J."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        GPTJConfig,
        GPTJModel,
    )

    tokenizer = _tokenizer()
    size = {"vocab_size": len(tokenizer), "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    language_model = GPT2LMHeadModel(GPT2Config(**size, **ends))
    labels = {"id2label": {0: "toxic"}, "label2id": {"toxic": 0}, "pad_token_id": tokenizer.eos_token_id}
    classifier = GPT2ForSequenceClassification(GPT2Config(**size, **ends, **labels))
    for name, model in (("policy", language_model), ("classifier", classifier)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    backbone = GPTJModel(GPTJConfig(rotary_dim=4, **size, **ends))
    state = {f"transformer.{name}": weight.contiguous() for name, weight in backbone.state_dict().items()}
    state["v_head.weight"] = torch.randn(1, size["n_embd"])
    backbone.config.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")
    save_file(state, folder / "reward_model" / "model.safetensors")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, _corpus())) + "\n", encoding="utf-8")
    return ToyModels(folder / "policy", folder / "classifier", folder / "reward_model", corpus)


def _corpus() -> list[dict[str, Any]]:
    """Documents of three sentences with made-up scores, in the columns of PHF's datasets."""
    texts = [text.strip() for text in _texts() if 20 < len(text) < 200][:144]
    documents = [texts[i : i + 3] for i in range(0, len(texts), 3)]
    return [
        {"texts": [f"{text} " for text in texts], "scores": [round((i % 7) * k / 20, 3) for k in range(3)]}
        for i, texts in enumerate(documents)
    ]


def _tokenizer() -> Any:
    """Byte-level BPE of 600 tokens, trained on the embedded samples of all tasks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )


def _texts() -> list[str]:
    files = sorted((PROJECT / "textalign_dagster" / "tasks").glob("*/data/train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [text for row in rows for text in _strings(row)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _strings(item)]
