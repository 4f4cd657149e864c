"""Text to token ids and back, by one rule that sampling, scoring and training share.

A prompt is tokenised with the beginning-of-sequence token, if the tokenizer adds one by default, and
never with an end token; a text is tokenised separately, as plain text even where it spells a special
token; the two are then concatenated, so a sample's tokens never merge with its prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANCHOR = "a"  # any single character that no tokenizer strips


class BannedTokenError(ValueError):
    """A banned token is not exactly one token of the tokenizer."""


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt; empty for an empty prompt if there is no beginning-of-sequence token."""
    if not prompts:
        return []
    start = leading_ids(tokenizer)
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    # A chat template writes the beginning-of-sequence token itself: it must not appear twice.
    return [row if row[: len(start)] == start else [*start, *row] for row in rows]


def beginning(folder: Path, *, trust_remote_code: bool = False) -> str:
    """The stand-in for an empty prompt: "" if the tokenizer adds a first token, else its end token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if leading_ids(tokenizer):
        return ""  # the tokenizer adds it to every prompt anyway
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {folder} has no token that a text could start from")
    return str(tokenizer.eos_token)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    return [list(ids) for ids in encoded["input_ids"]]


def token_counts(folder: Path, texts: Sequence[str], *, trust_remote_code: bool = False) -> list[int]:
    """Number of tokens of each text under a model's tokenizer, without special tokens."""
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return [len(ids) for ids in encode_texts(tokenizer, texts)]


def leading_ids(tokenizer: Any) -> list[int]:
    """The special ids that the tokenizer prepends to a text by default (often none)."""
    with_specials = tokenizer(ANCHOR, add_special_tokens=True)["input_ids"]
    alone = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    for start in range(len(with_specials) - len(alone) + 1):
        if with_specials[start : start + len(alone)] == alone:
            return list(with_specials[:start])
    return []


def trailing_ids(tokenizer: Any) -> list[int]:
    """The special ids that the tokenizer appends to a text by default (BERT's [SEP]; often none)."""
    whole = tokenizer(ANCHOR, add_special_tokens=True)["input_ids"]
    alone = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    return list(whole[len(leading_ids(tokenizer)) + len(alone) :])


def end_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's end token, and any others of the model.

    An id of the model that is an ordinary token of the tokenizer is left out: it is a default of
    the model's class (2 for Llama), not an end token of this tokenizer.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = {i for i in listed if i in known}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def banned_ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of banned tokens, given as vocabulary entries or as text.

    Raises `BannedTokenError` for text that is not exactly one token.
    """
    vocabulary = tokenizer.get_vocab() if tokens else {}
    ids = []
    for token in tokens:
        found = [vocabulary[token]] if token in vocabulary else encode_texts(tokenizer, [token])[0]
        if len(found) != 1:
            raise BannedTokenError(
                f"banned token {token!r} is {len(found)} tokens of this tokenizer; "
                "only single tokens can be banned"
            )
        ids.append(found[0])
    return tuple(ids)


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of generated ids as a continuation of a prompt: leading spaces kept, special tokens skipped.

    SentencePiece tokenizers drop the leading space of what they decode, so the ids are decoded after an
    anchor.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    anchor = encode_texts(tokenizer, [ANCHOR])[0]
    start = tokenizer.decode(anchor, **options)
    texts: list[str] = tokenizer.batch_decode([[*anchor, *row] for row in rows], **options)
    if all(text.startswith(start) for text in texts):
        return [text.removeprefix(start) for text in texts]
    return list(tokenizer.batch_decode([list(row) for row in rows], **options))
