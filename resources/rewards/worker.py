"""The scoring worker: classifiers and reward models behind JSON lines on stdin and stdout.

    python -m resources.rewards.worker '{"dtype": "float32", "device": "auto", ...}'

Started by `scoring.score_samples`. A call is {"pairs": [[prompt, text], …], "total": pairs}; the result is one
[score, null] or [null, reason] per pair. For the protocol, see `resources.workers.serving`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from resources.rewards.head import LastTokenReward, load_classifier, load_last_token
from resources.rewards.inputs import Limits, Row, TooLong, chat_template, encode, end_position, shortened
from resources.workers.serving import CallError, Report, begin, quiet_transformers, reason, serve

UNLIMITED = 10**9  # tokenizers without a limit report 10**30

Scored = tuple[float | None, str | None]


def main() -> None:
    settings, calls, send = begin()
    quiet_transformers()
    device = settings["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    send({"ready": {"device": device}})
    model: ScoringModel | None = None

    def answer(call: dict[str, Any], report: Report) -> list[Scored]:
        nonlocal model
        model = model or ScoringModel(settings, device)
        return model.score(call["pairs"], report)

    serve(calls, send, answer)


class ScoringModel:
    """A model with its tokenizer, and how its inputs and outputs are treated.

    settings: those of the scorer, with ``folder`` (and ``weights_folder``) for where its files are.
    """

    def __init__(self, settings: dict[str, Any], device: str) -> None:
        from transformers import AutoTokenizer

        self.settings, self.device, self.folder = settings, device, Path(settings["folder"])
        trust = settings["trust_remote_code"]
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust)
        except Exception as error:
            raise CallError(
                f"{self.folder} has no tokenizer that can be loaded ({reason(error, 200)}); save the model's tokenizer "
                "there"
            ) from error
        dtype = getattr(torch, settings["dtype"])
        self.model: Any
        if settings["head"] == "gptj_last_token":
            self.model = load_last_token(self.folder, Path(settings["weights_folder"]), dtype, trust)
        else:
            self.model = load_classifier(self.folder, dtype, trust)
        headed = isinstance(self.model, LastTokenReward)
        self.body: Any = self.model.body if headed else self.model
        self.config: Any = self.body.config
        self.output = 0 if headed else self._output(settings["label"])
        self._fits_tokenizer()
        pad = self.config.get_text_config().pad_token_id
        self.own_padding: int | None = pad if pad is not None and pad >= 0 else None
        try:
            self.model = self.model.to(device).eval()
        except (AssertionError, RuntimeError) as error:
            raise CallError(
                f"{self.folder} cannot be moved to device {device!r} ({str(error).splitlines()[0]}); use device cpu, "
                "a smaller dtype, or more memory"
            ) from error
        template = settings["template"]
        self.template = chat_template(self.tokenizer) if template == "chat" else template
        self.limits = Limits(self._longest(), settings["keep"], settings["allow_truncated_text"])

    def score(self, pairs: Sequence[tuple[str, str]], report: Report) -> list[Scored]:
        """A score or a reason for each pair, in order."""
        rows = encode(self.tokenizer, pairs, self.template, self.settings["cue"])
        results: list[Scored] = [(None, "")] * len(rows)
        fitting: list[tuple[int, Row]] = []
        for index, row in enumerate(rows):
            try:
                cut = shortened(row, self.limits)
            except TooLong as problem:
                results[index] = (
                    None,
                    f"{problem} (of {self.limits.max_length} in all); set allow_truncated_text to score its beginning",
                )
                continue
            if cut.ids:
                fitting.append((index, cut))
            else:
                results[index] = (None, "nothing to score: no token")
        done = len(rows) - len(fitting)
        for batch in batches(fitting, self.settings["batch_tokens"]):
            for (index, _), score in zip(batch, self._scores([row for _, row in batch]), strict=True):
                good = math.isfinite(score)
                results[index] = (score, None) if good else (None, f"the model's output is {score}")
            done += len(batch)
            report(done)
        return results

    def _scores(self, rows: Sequence[Row]) -> list[float]:
        try:
            return self._forward(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise CallError(
                    f"{self.device} ran out of memory with one input of {len(rows[0].ids)} tokens; lower "
                    "max_length, or use a smaller dtype or more memory"
                ) from None
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return self._scores(rows[:half]) + self._scores(rows[half:])

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row]) -> list[float]:
        pad = self._padding(rows)
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            mask[i, : len(row.ids)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        if isinstance(self.model, LastTokenReward):
            ends = {i for i in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if i is not None}
            where = torch.tensor([end_position(row, ends) for row in rows], device=ids.device)
            rewards = self.model(ids, mask)
            return list(rewards[torch.arange(len(rows), device=ids.device), where].tolist())
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        activation = self.settings["activation"]
        if activation == "softmax":
            logits = logits.softmax(-1)
        elif activation == "sigmoid":
            logits = logits.sigmoid()
        return list(logits[:, self.output].tolist())

    def _padding(self, rows: Sequence[Row]) -> int:
        """The id to pad with.

        Classifiers score at the last token that is not padding. If a model has no padding token, any id
        that no row ends with will do; it is set for each batch.
        """
        if self.own_padding is not None:
            return self.own_padding
        last = {row.ids[-1] for row in rows}
        pad = next(i for i in range(len(rows) + 1) if i not in last)
        self.config.pad_token_id = self.config.get_text_config().pad_token_id = pad
        return pad

    def _output(self, label: str | int | None) -> int:
        """The index of the output that is the score."""
        count = int(self.config.num_labels)
        names = {str(name): int(index) for name, index in (self.config.label2id or {}).items()}
        listed = ", ".join(sorted(names, key=lambda name: names[name]))
        if label is None and count == 1:
            return 0
        if label is None:
            raise CallError(
                f"{self.folder} has {count} outputs ({listed}); set `label` to the one that is the reward"
            )
        if isinstance(label, int):
            if not 0 <= label < count:
                raise CallError(
                    f"{self.folder} has no output {label}; its outputs are 0 to {count - 1} ({listed})"
                )
            return label
        if label not in names:
            raise CallError(f"{self.folder} has no label {label!r}; one of: {listed}")
        return names[label]

    def _longest(self) -> int:
        """Maximum number of tokens of an input."""
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        embeddings = getattr(self.body.base_model, "embeddings", None)
        positions = getattr(embeddings, "position_embeddings", None)
        first = getattr(positions, "padding_idx", None)
        if context is not None and first is not None:
            context -= first + 1  # RoBERTa's positions start there
        limits = [n for n in (context, self.tokenizer.model_max_length) if n is not None and n < UNLIMITED]
        max_length = self.settings["max_length"]
        if max_length is None:
            return int(min(limits, default=UNLIMITED))
        if context is not None and max_length > context:
            raise CallError(f"max_length is {max_length}, but {self.folder} holds {context} tokens; lower it")
        return int(max_length)

    def _fits_tokenizer(self) -> None:
        rows = self.body.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > rows:
            raise CallError(
                f"{self.folder}: the tokenizer has {len(self.tokenizer)} tokens, the model {rows} embeddings; "
                "use the tokenizer that belongs to the model"
            )


def batches(rows: Sequence[tuple[int, Row]], tokens: int) -> Iterator[list[tuple[int, Row]]]:
    """The rows, longest first, in batches of at most ``tokens`` including padding (but at least one row)."""
    ordered = sorted(rows, key=lambda item: (-len(item[1].ids), item[0]))
    start = 0
    while start < len(ordered):
        size = max(1, tokens // len(ordered[start][1].ids))
        yield ordered[start : start + size]
        start += size


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
