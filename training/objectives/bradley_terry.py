"""The Bradley–Terry loss of reward models (Ouyang et al. 2022, eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from training.objectives.base import Loss, Need, Sequences
from training.objectives.pairs import PairObjective, pair_loss, paired
from training.objectives.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class BradleyTerry(PairObjective):
    """The loss per pair: −log σ(score of the chosen text − score of the rejected one)."""

    name: Literal["bradley_terry"] = "bradley_terry"

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"score head"}

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        assert tokens.outputs is not None, "required by the objective"
        chosen, rejected = paired(sequences)
        return bradley_terry(tokens.outputs[chosen], tokens.outputs[rejected], sequences.weights[chosen])


def bradley_terry(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Loss:
    """l = −log σ(s_w − s_l); all [pairs]."""
    from torch.nn.functional import logsigmoid

    margins = chosen - rejected
    return pair_loss(-logsigmoid(margins), margins, weights)
