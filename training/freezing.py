"""Which transformer blocks of a policy are trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def train_last_blocks(model: PreTrainedModel, last: int | float) -> list[str]:
    """Freezes all transformer blocks but the last ones; everything outside the blocks stays trainable.

    As published for ALT (GPT-J, share 0.3: of 28 blocks int(0.3 * 28) = 8 are trained, with embeddings,
    final norm and LM head), but for any architecture, and a ``last`` of 0 freezes all blocks (the
    published slice ``[:-0]`` is empty and freezes nothing). Weights that a block shares with
    something outside the blocks stay trainable.

    Args:
        last: an int counts blocks; a float is their share, rounded down.

    Returns:
        The frozen parameters' names.

    Raises:
        ValueError: the model has fewer blocks, or its blocks cannot be found.
    """
    prefix, blocks = transformer_blocks(model)
    # Rounding down must not lose a block to binary fractions: 0.29 of 100 is 28.999….
    count = last if isinstance(last, int) else int(last * len(blocks) + 1e-9)
    if count > len(blocks):
        raise ValueError(f"cannot train {count} blocks, the model has {len(blocks)}; lower it")
    first = len(blocks) - count
    frozen = {p for block in blocks[:first] for p in block.parameters()}
    frozen -= {p for block in blocks[first:] for p in block.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{prefix}."):
            frozen.discard(parameter)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter in frozen]


def transformer_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's ``config.num_hidden_layers`` blocks, after its name in the model.

    Lists inside another list of that length (e.g. the experts of a block) do not count.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == length
    }
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    }
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise ValueError(
            f"the blocks of a {type(model).__name__} cannot be identified (lists of {length} modules: {found}); "
            "leave trainable_layers out"
        )
    return next(iter(outermost.items()))
