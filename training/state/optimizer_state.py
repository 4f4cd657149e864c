"""AdamW's state between iterations: moments in safetensors, everything else in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from training.job import JobError

TENSORS, FACTS = "optimizer.safetensors", "optimizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerState:
    """What a training passes on to the next one: tensors by ``parameter/kind``, and the coefficients."""

    tensors: dict[str, Tensor]
    coefficients: dict[str, float]
    where: str

    @classmethod
    def of(
        cls, model: PreTrainedModel, optimizer: torch.optim.Optimizer, coefficients: dict[str, float]
    ) -> OptimizerState:
        """The state after a training. Frozen weights have none."""
        tensors = {
            f"{name}/{kind}": torch.as_tensor(value).detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
            for kind, value in optimizer.state[parameter].items()
        }
        return cls(tensors, coefficients, "this training")

    def write(self, folder: Path) -> None:
        """Writes both files."""
        save_file(self.tensors, folder / TENSORS)
        facts = {"optimizer": "AdamW", "coefficients": self.coefficients}
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> OptimizerState:
        """The state in a folder.

        Raises:
            JobError: a file is missing or broken.
        """
        try:
            tensors = load_file(folder / TENSORS)
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            coefficients = {str(name): float(value) for name, value in facts["coefficients"].items()}
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise JobError(
                f"optimizer: {folder} holds no state to continue from ({error}); train the previous iteration "
                "again, or set training.optimizer_state to fresh"
            ) from None
        return cls(tensors, coefficients, str(folder))

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Restores this state in an optimizer: each weight continues from its own moments and step.

        Rows that a vocabulary has gained (special tokens) start with moments of 0, at the step of
        their matrix. Weights without a state here (frozen before) start fresh; the state of
        weights that are frozen now is dropped.

        Raises:
            JobError: the state belongs to another model.
        """
        names = {parameter: name for name, parameter in model.named_parameters()}
        kept: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, _, kind = key.rpartition("/")
            kept.setdefault(name, {})[kind] = tensor
        unknown = kept.keys() - set(names.values())
        if unknown:
            raise JobError(
                f"optimizer: {self.where} is another model's state (it has {min(unknown)}, which the policy "
                "does not have); set training.optimizer_state to fresh"
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            i: {kind: self._fitted(names[p], kind, tensor, p) for kind, tensor in kept[names[p]].items()}
            for i, p in enumerate(parameters)
            if names[p] in kept
        }
        # Loading also moves each tensor to its weight's device.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _fitted(self, name: str, kind: str, tensor: Tensor, parameter: Tensor) -> Tensor | int:
        if kind not in MOMENTS or tensor.shape == parameter.shape:
            # 8-bit AdamW counts steps as a plain number, torch's as a float tensor.
            return int(tensor) if tensor.dtype == torch.int64 else tensor
        gained = parameter.shape[0] - tensor.shape[0] if tensor.ndim and parameter.ndim else 0
        if gained <= 0 or tensor.shape[1:] != parameter.shape[1:]:
            raise JobError(
                f"optimizer: {self.where}: {name} has shape {list(tensor.shape)}, but in the policy "
                f"{list(parameter.shape)}; set training.optimizer_state to fresh"
            )
        return torch.cat([tensor, tensor.new_zeros((gained, *tensor.shape[1:]))])
