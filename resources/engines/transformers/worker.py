"""The sampling worker: transformers models behind JSON lines on stdin and stdout.

    python -m resources.engines.transformers.worker '{"dtype": "float32", "device": "auto", ...}'

Started by `sampler.TransformersSampler`. A call is {"op": "generate" | "logprobs", ...}; for the
protocol, see `resources.workers.serving`.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

from resources.engines.text import as_completions, banned_of, check_embeddings, pairs_of, prompts_of
from resources.workers.serving import CallError, Report, begin, quiet_transformers, reason, serve, version_of

LOGITS_BYTES = 256 * 2**20  # limit for one batch in logprobs()


def main() -> None:
    settings, calls, send = begin()
    import torch

    quiet_transformers()
    device = settings["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = LoadedModel(settings["dtype"], device, settings["trust_remote_code"])
    send({"ready": {"device": device, "threads": torch.get_num_threads()}})
    serve(calls, send, lambda call, report: answer(loaded, call, settings["batch_size"], report))


class LoadedModel:
    """The model in memory; replaced when another folder, or a changed one, is requested."""

    def __init__(self, dtype: str, device: str, trust_remote_code: bool) -> None:
        self.dtype, self.device, self.trust_remote_code = dtype, device, trust_remote_code
        self.identity: object = None
        self.folder = Path()
        self.model: Any = None
        self.tokenizer: Any = None

    def use(self, folder: Path) -> None:
        identity = version_of(folder)
        if identity == self.identity:
            return
        self.identity = self.model = self.tokenizer = None
        self.load(folder)
        self.identity, self.folder = identity, folder

    def load(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from resources.engines.transformers import attention

        if self.device != "cpu":
            torch.cuda.empty_cache()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:
            raise CallError(
                f"{folder} cannot be loaded as a causal language model ({reason(error)}); use a "
                "transformers folder with config.json, *.safetensors and a tokenizer"
            ) from error
        model, info = loaded
        missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if missing:
            raise CallError(
                f"{folder} lacks {len(missing)} weights that its config.json requires and that would "
                f"be random (e.g. {missing[0]}); save the whole model again"
            )
        rows = model.get_input_embeddings().num_embeddings
        check_embeddings(folder, tokenizer, rows)
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise CallError(
                f"{folder}: {type(model).__name__} has no cache of keys and values; "
                "this engine samples only from models with attention (hybrid ones included)"
            )
        try:
            model = model.to(self.device)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CallError(
                f"device {self.device!r} cannot be used ({str(error).splitlines()[0]}); "
                "set device to auto or cpu"
            ) from error
        self.model, self.tokenizer = model.eval(), tokenizer
        if self.device == "cpu":
            attention.install(self.model)

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of prompt and completion together; None: no limit."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def outputs(self) -> int:
        """Number of logits."""
        head = self.model.get_output_embeddings() or self.model.get_input_embeddings()
        return int(head.weight.shape[0])


def answer(loaded: LoadedModel, call: dict[str, Any], batch_size: int, report: Report) -> list[Any]:
    """The result of a call; raises `CallError`."""
    import torch

    from resources.engines.transformers.decoding import NotFiniteError
    from textalign_dagster.tokenisation import BannedTokenError

    try:
        loaded.use(Path(call["model"]))
        report(0)
        if call["op"] == "generate":
            return generate(loaded, call, batch_size, report)
        return logprobs(loaded, call, batch_size, report)
    except BannedTokenError as error:
        raise CallError(f"{loaded.folder}: {error}") from error
    except NotFiniteError as error:
        raise CallError(
            f"{loaded.folder}: the model's {error}; its training has diverged, or its values "
            f"overflow in {loaded.dtype}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and (
            "can't allocate memory" not in str(error)
        ):
            raise
        raise CallError(
            f"{loaded.device} ran out of memory with {batch_size} sequences of {loaded.folder} at "
            "once; lower batch_size, or give it more memory"
        ) from error


def generate(
    loaded: LoadedModel, call: dict[str, Any], batch_size: int, report: Report
) -> list[list[dict[str, Any]]]:
    """For each request, one `sampler.Completion` per seed, as a dictionary."""
    from resources.engines.transformers.decoding import Rule, batches, sample
    from textalign_dagster import tokenisation

    tokenizer, decoding = loaded.tokenizer, call["decoding"]
    if decoding["structured"] is not None:
        raise CallError(
            "engine transformers samples free text only; for structured output choose engine vllm"
        )
    prompts = prompts_of(loaded, call)
    ends = tokenisation.end_ids(tokenizer, loaded.model.generation_config)
    rule = Rule(
        temperature=decoding["temperature"],
        top_k=decoding["top_k"],
        top_p=decoding["top_p"],
        max_new_tokens=decoding["max_new_tokens"],
        min_new_tokens=decoding["max_new_tokens" if decoding["ignore_eos"] else "min_new_tokens"],
        end_ids=ends,
        banned_ids=tuple(sorted(banned_of(loaded, call))),
    )

    # A request with more seeds than a batch has rows is split, and its prompt prefilled again.
    parts = [(request, start, seeds[start : start + batch_size])
             for request, (_, seeds) in enumerate(call["requests"])
             for start in range(0, len(seeds), batch_size)]  # fmt: skip
    results: list[list[dict[str, Any]]] = [[{}] * len(seeds) for _, seeds in call["requests"]]
    done = 0

    def report_more(finished: float) -> None:
        report(done + finished)

    sizes, costs = [len(seeds) for _, _, seeds in parts], [len(prompts[r]) for r, _, _ in parts]
    for batch in batches(sizes, costs, batch_size):
        chosen = [parts[i] for i in batch]
        places = [
            (request, start + i) for request, start, part_seeds in chosen for i in range(len(part_seeds))
        ]
        drawn = sample(
            loaded.model,
            [prompts[request] for request, _, _ in chosen],
            [owner for owner, part in enumerate(chosen) for _ in part[2]],
            [seed for part in chosen for seed in part[2]],
            rule,
            report_more,
        )
        for (request, place), one in zip(places, as_completions(tokenizer, drawn), strict=True):
            results[request][place] = one
        done += len(places)
    return results


def logprobs(
    loaded: LoadedModel, call: dict[str, Any], batch_size: int, report: Report
) -> list[tuple[float, int]]:
    """For each (prompt, text): the sum of the log-probabilities of the text's tokens, and their number."""
    from resources.engines.transformers.decoding import batches, score

    prompts, texts = pairs_of(loaded, call)
    results = [(0.0, len(text)) for text in texts]
    nonempty = [i for i, text in enumerate(texts) if text]
    lengths = [len(prompts[i]) + len(texts[i]) for i in nonempty]
    longest = max(lengths, default=1)
    limit = max(1, min(batch_size, LOGITS_BYTES // (4 * longest * loaded.outputs)))
    done = len(texts) - len(nonempty)
    for batch in batches([1] * len(nonempty), lengths, limit):
        rows = [nonempty[i] for i in batch]
        sums = score(loaded.model, [prompts[i] for i in rows], [texts[i] for i in rows])
        for row, total in zip(rows, sums, strict=True):
            results[row] = (total, len(texts[row]))
        done += len(rows)
        report(done)
    return results


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
