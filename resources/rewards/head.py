"""Loading scoring models: transformers classifiers, and language models with a one-output head.

The latter is how CarperAI published its reward models: the state dict of a causal language model
without its output layer (``transformer.*``), and ``v_head.weight``, a linear layer without bias. Those
of GPT-J also contain causal masks, which newer versions of the model compute themselves; everything else
must fit exactly, because a model with one missing tensor scores like one that was never trained.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resources.workers.serving import CallError, reason

HEAD = "v_head.weight"
SAFE, UNSAFE = "model.safetensors", "pytorch_model.bin"

_MASKS = re.compile(r"\.attn\.(attention\.)?(bias|masked_bias)$")
_UNUSED = re.compile(r"^(lm_head|embed_out)\.|^(transformer\.)?lm_head\.")


class LastTokenReward(nn.Module):
    """A language model's body and a linear head: one reward per token."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards (rows, tokens), in float32."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        rewards: torch.Tensor = self.head(hidden).squeeze(-1).float()
        return rewards


def load_classifier(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A sequence classifier.

    Raises:
        CallError: it cannot be loaded, or some of its weights would be random.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        raise CallError(
            f"{folder} cannot be loaded as a sequence classifier ({reason(error, 300)}); use a transformers "
            "folder with config.json, *.safetensors and a tokenizer"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise CallError(
            f"{folder} lacks {len(missing)} weights that its config.json requires and that would be random (e.g. "
            f"{missing[0]}); it is not a trained classifier, or set `head: gptj_last_token`"
        )
    return model


def load_last_token(
    folder: Path, weights: Path, dtype: torch.dtype, trust_remote_code: bool
) -> LastTokenReward:
    """A language model with a head, config from ``folder`` and all tensors from ``weights``.

    Raises:
        CallError: a tensor is missing, left over or of another shape, or the file would need pickle.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with no_init_weights():  # skips 6 billion random numbers that would be overwritten
            body = AutoModel.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CallError(
            f"{folder}: no language model can be built from its config.json ({reason(error, 300)}); use the folder or hub id "
            "of the model that the reward model was trained from"
        ) from error
    tensors = _state(weights)
    if HEAD not in tensors:
        raise CallError(
            f"{weights}: no {HEAD} among its {len(tensors)} tensors; `head: gptj_last_token` needs it (a "
            "transformers classifier is `head: sequence_classification`)"
        )
    head = tensors.pop(HEAD)
    hidden = config.get_text_config().hidden_size
    if tuple(head.shape) != (1, hidden):
        raise CallError(f"{weights}: {HEAD} has shape {tuple(head.shape)}, not {(1, hidden)}")
    own = _of_body(tensors, body.base_model_prefix)
    expected = body.state_dict()
    missing = sorted(expected.keys() - own.keys())
    extra = sorted(name for name in own.keys() - expected.keys() if not _MASKS.search(name))
    shapes = sorted(n for n in expected.keys() & own.keys() if expected[n].shape != own[n].shape)
    if missing or extra or shapes:
        what = [f"{len(missing)} missing (e.g. {missing[0]})"] if missing else []
        what += [f"{len(extra)} left over (e.g. {extra[0]})"] if extra else []
        what += [f"{len(shapes)} of another shape (e.g. {shapes[0]})"] if shapes else []
        raise CallError(
            f"{weights} does not fit the language model of {folder}: {'; '.join(what)}; use the weights and "
            "the model that belong together"
        )
    body.load_state_dict({name: own[name] for name in expected})
    model = LastTokenReward(body, hidden).to(dtype)
    with torch.no_grad():
        model.head.weight.copy_(head)
    return model


def _of_body(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The body's tensors under its own names."""
    used = {name: tensor for name, tensor in tensors.items() if not _UNUSED.search(name)}
    for known in dict.fromkeys(("transformer.", f"{prefix}.")):
        if used and all(name.startswith(known) for name in used):
            return {name.removeprefix(known): tensor for name, tensor in used.items()}
    return used


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, from safetensors if there are any."""
    found: dict[str, torch.Tensor] = {}
    for path in _files(folder):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found |= load_file(path)
            continue
        try:
            # weights_only: only tensors are read and nothing is executed, whatever the file contains.
            part = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CallError(
                f"{path} holds more than tensors, or is damaged ({reason(error, 300)}), and is not opened: save it "
                "as safetensors on a machine where you trust it (safetensors.torch.save_file)"
            ) from error
        if not isinstance(part, dict) or not all(isinstance(t, torch.Tensor) for t in part.values()):
            raise CallError(f"{path} is not a state dict (name → tensor); save the model's state_dict()")
        found |= part
    return found


def _files(folder: Path) -> list[Path]:
    for name in (SAFE, UNSAFE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CallError(f"{index} cannot be read; fetch it again") from None
            paths = [folder / part for part in parts]
            gone = [path.name for path in paths if not path.is_file() or path.parent != folder]
            if gone:
                raise CallError(f"{folder} lacks {', '.join(gone)}; fetch them again")
            return paths
    raise CallError(f"{folder} has no {SAFE} and no {UNSAFE}; use the folder that holds the weights")
