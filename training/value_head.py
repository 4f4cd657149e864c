"""A head next to the LM head that predicts how good the text will be; it is not part of the policy.

Its output at a position is the value of the token that follows. It exists only during training, and is
saved with the optimizer state if the next iteration continues from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.job import JobError

NAME = "value_head"
FILE = "value_head.safetensors"


class ValueHead(nn.Linear):
    """−σ(w·h), between −1 and 0; w starts at 0, so the value starts at −0.5 (Korbak et al. 2023).

    Args:
        detached: whether the value loss is kept from the policy's weights.
    """

    def __init__(self, width: int, detached: bool):
        super().__init__(width, 1, bias=False)
        nn.init.zeros_(self.weight)
        self.detached = detached

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] last hidden states → [...] values."""
        states = hidden.detach() if self.detached else hidden
        return -super().forward(states.to(self.weight.dtype))[..., 0].sigmoid()


def attach(model: PreTrainedModel, detached: bool, earlier: Path | None = None) -> None:
    """Adds a value head to the model: the one saved in ``earlier``, if any, or else a new one.

    Raises:
        JobError: the saved head cannot be read, or belongs to another model.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    head = ValueHead(width, detached).to(next(model.parameters()).dtype)
    if earlier is not None and (earlier / FILE).exists():
        try:
            head.load_state_dict(load_file(earlier / FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise JobError(
                f"{earlier / FILE}: is not a value head of this policy ({error}); set training.optimizer_state to fresh"
            ) from None
    model.add_module(NAME, head)


def of(model: Any) -> ValueHead | None:
    """The model's value head, if it has one."""
    return getattr(model, NAME, None)


def take_out(state: dict[str, Tensor], keep: Path | None) -> None:
    """Removes the head's weights from a model's state dict, and saves them to ``keep``, if given."""
    prefix = f"{NAME}."
    head = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    if head and keep is not None:
        save_file(
            {name: torch.as_tensor(value).cpu().contiguous() for name, value in head.items()}, keep / FILE
        )
