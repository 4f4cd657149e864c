"""One forward pass: the log-probabilities of a batch's labelled tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from training import value_head
from training.data.packing import packed_logits
from training.objectives.tokens import IGNORE, Tokens, chosen_tokens, labelled


def labelled_tokens(model: Any, inputs: dict[str, Any], prefix: str) -> Tokens:
    """Reads a batch once: its sequences, and in ``second`` those that are also read under a second prompt.

    Args:
        inputs: as returned by ``Collator``.
        prefix: which prompts: the policy's own (empty), ``reference_``, or ``second_`` if they are apart.
    """
    tokens = _read(model, inputs, prefix)
    if prefix or "second_of" not in inputs:
        return tokens._replace(second=tokens.log_probs[:0], second_places=tokens.rows[:0])
    # Rows after the batch's sequences repeat some of these under a second prompt, in the same order.
    first = tokens.rows < len(inputs["weights"])
    log_probs, targets, rows = (part[first] for part in tokens[:3])
    places = torch.isin(rows, inputs["second_of"]).nonzero()[:, 0]
    return Tokens(log_probs, targets, rows, second=tokens.log_probs[~first], second_places=places)


def head_outputs(model: Any, inputs: dict[str, Any]) -> Tokens:
    """Reads a batch of padded rows with a score head: no log-probabilities, one output per sequence."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    outputs = logits[:, 0] if logits.dtype == torch.float64 else logits[:, 0].float()
    none = inputs["labels"].new_zeros(0)
    return Tokens(outputs.new_zeros(0, 0), none, none, outputs=outputs)


def _read(model: Any, inputs: dict[str, Any], prefix: str) -> Tokens:
    """Reads all rows of a batch; the output layer runs only on the positions that predict a label."""
    bare = getattr(model, "module", model)
    if hasattr(bare, "get_base_model"):  # an adapter forwards attributes that it does not have
        bare = bare.get_base_model()
    if f"{prefix}row_starts" in inputs:
        ids, positions, starts, predicts, targets, rows = (
            inputs[f"{prefix}{name}"]
            for name in ("input_ids", "position_ids", "row_starts", "predicts", "targets", "rows")
        )
        return chosen_tokens(packed_logits(model, bare, ids, positions, starts, predicts), targets, rows)
    keep = inputs[f"{prefix}keep"]
    partly: dict[str, Any] = (
        {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(bare.forward).parameters else {}
    )
    head = value_head.of(bare)
    if head is not None:
        partly |= {"output_hidden_states": True}
    output = model(
        input_ids=inputs[f"{prefix}input_ids"],
        attention_mask=inputs[f"{prefix}attention_mask"],
        use_cache=False,
        **partly,
    )
    labels = inputs[f"{prefix}labels"][:, -keep:]
    tokens = labelled(output.logits[:, -keep:], labels)
    if head is None:
        return tokens
    hidden = output.hidden_states[-1][:, -keep:]
    return tokens._replace(values=head(hidden[:, :-1][labels[:, 1:] != IGNORE]))
