"""A head that predicts how good the text will be, beside the LM head; it is not part of the policy.

Its output at a position is the value of the token that follows. It exists while a policy trains, and is
kept beside the optimizer's state where the next iteration continues from that.
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
    """−σ(w·h), between −1 and 0; w starts at 0, so the value at −0.5 (Korbak et al. 2023).

    Args:
        detached: the loss of the value does not reach the policy's weights.
    """

    def __init__(self, width: int, detached: bool):
        super().__init__(width, 1, bias=False)
        nn.init.zeros_(self.weight)
        self.detached = detached

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] last hidden states → [...] values."""
        seen = hidden.detach() if self.detached else hidden
        return -super().forward(seen.to(self.weight.dtype))[..., 0].sigmoid()


def attach(model: PreTrainedModel, detached: bool, earlier: Path | None = None) -> None:
    """Gives the model a value head, as it was left in a folder, or a new one.

    Raises:
        JobError: the one in the folder cannot be read, or is another model's.
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
    """Removes the head's weights from a model's state, and keeps them in a folder."""
    prefix = f"{NAME}."
    head = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    if head and keep is not None:
        save_file(
            {name: torch.as_tensor(value).cpu().contiguous() for name, value in head.items()}, keep / FILE
        )
