"""New tokens of a policy (Quark's quantile tokens) and their initial embeddings."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_special_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[str],
    init: Literal["mean_std", "eos"],
    seed: int,
) -> list[int]:
    """Makes each of ``tokens`` a special token, and returns their ids, in order.

    Tokens that the tokenizer already has keep their embeddings, so that the call is harmless in
    later iterations. New rows of the input *and* the output embeddings (one matrix if they are
    tied) are initialised

    - ``mean_std``: from a normal with each dimension's mean and standard deviation over the old
      vocabulary (ALT's released code; it did so only for the input embeddings);
    - ``eos``: as a copy of the end token's row.

    Rows that the model has beyond its tokenizer (padded vocabularies) are used before the
    embeddings grow, and are not part of the old vocabulary.

    Raises:
        ValueError: ``eos`` without an end token.
    """
    if init == "eos" and tokenizer.eos_token_id is None:
        raise ValueError("special_token_init is 'eos', but the tokenizer has no eos_token; use 'mean_std'")
    old = len(tokenizer)
    known = set(tokenizer.get_vocab())
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if new:
        tokenizer.add_tokens(
            [AddedToken(t, special=True, normalized=False) for t in new], special_tokens=True
        )
        if len(tokenizer) > vocabulary_rows(model):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        ids = _ids(tokenizer, new)
        generator = torch.Generator().manual_seed(seed)
        for matrix in _vocabulary_matrices(model):
            _start(matrix, ids, old, tokenizer.eos_token_id if init == "eos" else None, generator)
    return _ids(tokenizer, tokens)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the input embeddings: at least the tokenizer's tokens, more if they are padded."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    known = tokenizer.get_vocab()
    return [known[token] for token in tokens]


def _vocabulary_matrices(model: Any) -> list[Tensor]:
    """Input embeddings, output embeddings and the output's bias, without duplicates."""
    distinct: dict[int, Tensor] = {}
    output = model.get_output_embeddings()
    for matrix in (
        model.get_input_embeddings().weight,
        getattr(output, "weight", None),
        getattr(output, "bias", None),
    ):
        if matrix is not None:
            distinct.setdefault(matrix.data_ptr(), matrix)
    return list(distinct.values())


@torch.no_grad()
def _start(matrix: Tensor, ids: list[int], old: int, copied: int | None, generator: torch.Generator) -> None:
    if copied is not None:
        matrix[ids] = matrix[copied].clone()
        return
    rows = matrix[:old].double()
    mean, deviation = rows.mean(0), rows.std(0)
    draw = torch.randn((len(ids), *mean.shape), generator=generator, dtype=torch.float64).to(matrix.device)
    matrix[ids] = (mean + deviation * draw).to(matrix.dtype)
