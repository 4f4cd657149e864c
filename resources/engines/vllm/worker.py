"""The vLLM worker: an offline engine behind JSON lines on stdin and stdout.

    python -m resources.engines.vllm.worker '{"dtype": "float32", "batch_size": 256, ...}'

Started by `sampler.VllmSampler`. A call is {"op": "generate" | "logprobs", ...}; for the protocol, see
`resources.workers.serving`. A result is {"rows": [...]}, or {"failed": sentence} when the engine itself
failed, after which this process is unusable.

The engine takes and returns token ids, so text is tokenised in the same way as for all engines.
It starts with the first model; other weights of the same shape are loaded into it, anything else
requires a new worker (see `sampler.frame`).
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from resources.engines.text import Drawn, check_embeddings, pairs_of, prompts_of
from resources.engines.vllm.adapters import Adapters, options
from resources.engines.vllm.requests import (
    banned,
    completions,
    decoding,
    end_ids_of,
    finite,
    seed_of,
    structure,
)
from resources.workers.serving import CallError, Report, begin, quiet_transformers, reason, serve, version_of
from textalign_dagster.settings.structured import WHERE

CPU_CACHE_GIB = 1.0
NEVER = -float("inf")


class EngineError(Exception):
    """The engine failed, and with it this process; the message is for the user."""


def main() -> None:
    settings, calls, send = begin()
    import torch
    from vllm.platforms import current_platform

    quiet_transformers()
    device = str(current_platform.device_type)
    engine = Engine(settings, device)
    send({"ready": {"device": device, "threads": torch.get_num_threads()}})
    serve(calls, send, lambda call, report: answer(engine, call, report))


class Engine:
    """A vLLM engine with one model: started for the first one, and given other weights later."""

    def __init__(self, settings: dict[str, Any], device: str) -> None:
        self.settings, self.device = settings, device
        self.identity: object = None
        self.folder = Path()
        self.llm: Any = None
        self.tokenizer: Any = None
        self.end_ids: tuple[int, ...] = ()
        self.adapters = Adapters()
        self.adapter: Any = None  # the LoRA request sent with each request; None: the model itself

    def use(self, folder: Path, adapter: Path | None = None) -> None:
        """Load the model of a folder into the engine, with an adapter on top of it if one is given.

        Raises:
            CallError: its tokenizer cannot be read, or does not fit the model; the adapter cannot be served.
            EngineError: vLLM cannot start with it, or cannot read its weights.
        """
        self.load(folder)
        self.adapter = None if adapter is None else self.adapters.request(self.llm, adapter)
        self.folder = folder if adapter is None else adapter  # what errors name

    def load(self, folder: Path) -> None:
        """Load the weights and the tokenizer of a folder.

        Raises:
            CallError: its tokenizer cannot be read, or does not fit the model.
            EngineError: vLLM cannot start with it, or cannot read its weights.
        """
        identity = version_of(folder)
        if identity == self.identity:
            return
        self.identity = None
        self.adapters.forget()
        self.read_tokenizer(folder)
        try:
            if self.llm is None:
                self.llm = start(folder, self.settings, self.device)
            else:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                if self.device == "cpu":
                    self.llm.apply_model(repack_heads)
                # The new weights must not reuse keys and values that the old ones computed.
                self.llm.reset_prefix_cache()
        except Exception as error:
            raise EngineError(f"vLLM cannot run {folder} here ({reason(error)}); {remedy(error)}") from error
        check_embeddings(folder, self.tokenizer, self.outputs)
        self.identity = identity

    def read_tokenizer(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        trusted = self.settings["trust_remote_code"]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        except Exception as error:
            raise CallError(
                f"the tokenizer of {folder} cannot be loaded ({reason(error)}); save the model's tokenizer there"
            ) from error
        self.end_ids = end_ids_of(folder, self.tokenizer)

    @property
    def context(self) -> int:
        """Maximum number of tokens of prompt and completion together."""
        return int(self.llm.model_config.max_model_len)

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return int(self.llm.model_config.get_vocab_size())


def start(folder: Path, settings: dict[str, Any], device: str) -> Any:
    """An engine with the model of a folder, in this process (vLLM's workers are its children)."""
    from vllm import LLM

    if not device:
        raise RuntimeError("this vLLM is built for hardware that this machine does not have")
    gib = settings["kv_cache_gib"] or (CPU_CACHE_GIB if device == "cpu" else None)
    eager = settings["enforce_eager"]
    with tempfile.TemporaryDirectory() as nothing:
        # The model's own defaults, including its end tokens, must not override a `Decoding`.
        (Path(nothing) / "generation_config.json").write_text("{}")
        return LLM(
            model=str(folder),
            # Grammars are built from the tokens' texts; nothing else in vLLM handles text.
            skip_tokenizer_init=not settings["structured"],
            structured_outputs_config={"backend": "xgrammar"},
            dtype=settings["dtype"],
            load_format="safetensors",
            trust_remote_code=settings["trust_remote_code"],
            tensor_parallel_size=settings["tensor_parallel"],
            gpu_memory_utilization=settings["gpu_memory_utilization"],
            kv_cache_memory_bytes=None if gib is None else int(gib * 2**30),
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["batch_size"],
            # On a CPU, compiling a small model takes longer than it ever saves.
            enforce_eager=device == "cpu" if eager is None else eager,
            # On a CPU, vLLM fails when the prompt of a request with a seed is prefilled in more than one step.
            enable_chunked_prefill=False if device == "cpu" else None,
            enable_prefix_caching=True,  # a prompt is prefilled once for all its completions
            logprobs_mode="raw_logprobs",
            **options(folder, settings),
            generation_config=nothing,
            seed=0,
        )


def repack_heads(model: Any) -> None:
    """Rebuild the packed weights of output heads.

    On a CPU, vLLM multiplies by a rearranged copy of a head's weights. A head that is tied to the
    embeddings loads no weights, so reloading leaves that copy stale.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def answer(engine: Engine, call: dict[str, Any], report: Report) -> dict[str, Any]:
    """The rows of a call, or why the engine failed; raises `CallError`."""
    from textalign_dagster.tokenisation import BannedTokenError

    try:
        engine.use(Path(call["model"]), Path(call["adapter"]) if "adapter" in call else None)
        report(0)
        return {"rows": (generate if call["op"] == "generate" else logprobs)(engine, call, report)}
    except EngineError as error:
        return {"failed": str(error)}
    except BannedTokenError as error:
        raise CallError(f"{engine.folder}: {error}") from error


def generate(engine: Engine, call: dict[str, Any], report: Report) -> list[list[dict[str, Any]]]:
    """For each request, one `sampler.Completion` per seed, as a dictionary.

    Each seed is a separate request to vLLM: with ``n``, vLLM would derive the seeds of a prompt's further
    completions itself.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    common = {**decoding(engine, call["decoding"]), "detokenize": False}
    prompts, structured = prompts_of(engine, call), structure(engine, call["decoding"])
    common["logit_bias"] = dict.fromkeys(sorted(banned(engine, call)), NEVER) or None
    if structured is not None:
        if not engine.settings["structured"]:
            raise CallError(f"{WHERE}: engine vllm was not started for it; start it with structured=True")
        common["logprobs"] = None  # they would be relative to the tokens that the structure allows
    pairs = [(prompt, seed) for prompt, (_, seeds) in zip(prompts, call["requests"], strict=True)
             for seed in seeds]  # fmt: skip
    try:
        outputs = run(
            engine,
            [prompt for prompt, _ in pairs],
            [
                SamplingParams(
                    **common,
                    seed=seed_of(seed),
                    structured_outputs=None if structured is None else StructuredOutputsParams(**structured),
                )
                for _, seed in pairs
            ],
            report,
        )
    except EngineError as error:
        if structured is None or not isinstance(error.__cause__, VLLMValidationError):
            raise
        message = " ".join(str(error.__cause__).split())[:400]
        raise CallError(f"{WHERE}: vLLM refuses it ({message}); change it") from error
    drawn = [output.outputs[0] for output in outputs]
    ids = [list(one.token_ids) for one in drawn]
    if structured is None:
        sums = [finite(engine, one.cumulative_logprob) for one in drawn]
    else:
        if any(one.finish_reason not in ("stop", "length") for one in drawn):
            raise CallError(
                f"{WHERE}: vLLM cannot follow it with {engine.folder}: its grammars do not support it, it allows "
                "only banned tokens, or the model's logits are not finite"
            )
        sums = text_logprobs(engine, [prompt for prompt, _ in pairs], ids, lambda done: None)
    ended = [one.finish_reason == "stop" for one in drawn]
    return completions(engine, call, map(Drawn, ids, ended, sums))


def logprobs(engine: Engine, call: dict[str, Any], report: Report) -> list[tuple[float, int]]:
    """For each (prompt, text): the sum of the log-probabilities of the text's tokens, and their number."""
    prompts, texts = pairs_of(engine, call)
    return list(zip(text_logprobs(engine, prompts, texts, report), map(len, texts), strict=True))


def text_logprobs(
    engine: Engine, prompts: list[list[int]], texts: list[list[int]], report: Report
) -> list[float]:
    """The summed log-probability of each text's tokens given its prompt; 0 for an empty text.

    vLLM always generates at least one token, so the text's last token is not part of the prompt: its
    log-probability is requested at the position that is generated (and discarded).
    """
    from vllm import SamplingParams

    nonempty = [index for index, text in enumerate(texts) if text]
    empty = len(texts) - len(nonempty)
    outputs = run(
        engine,
        [prompts[index] + texts[index][:-1] for index in nonempty],
        [
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=0,
                logprob_token_ids=[texts[index][-1]],
                detokenize=False,
            )
            for index in nonempty
        ],
        lambda done: report(empty + done),
    )
    results = [0.0] * len(texts)
    for index, output in zip(nonempty, outputs, strict=True):
        first, text = len(prompts[index]), texts[index]
        read = output.prompt_logprobs[first:]
        terms = [place[token].logprob for place, token in zip(read, text[:-1], strict=True)]
        terms.append(output.outputs[0].logprobs[0][text[-1]].logprob)
        results[index] = finite(engine, math.fsum(terms))
    return results


def run(engine: Engine, prompts: list[list[int]], params: list[Any], report: Report) -> list[Any]:
    """vLLM's output for each prompt, in order."""
    from tqdm import tqdm

    class Count(tqdm):
        """A progress bar for vLLM that draws nothing and reports progress."""

        def update(self, n: float | None = 1) -> bool | None:
            done = super().update(n)
            report(int(self.n))
            return done

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        try:
            engine.llm.enqueue(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                params,
                lora_request=engine.adapter,
                use_tqdm=False,
            )
            return list(
                engine.llm.wait_for_completion(use_tqdm=lambda **options: Count(**options, file=nowhere))
            )
        except Exception as error:
            raise EngineError(
                f"vLLM failed with {engine.folder} ({reason(error)}); {remedy(error)}"
            ) from error


def remedy(error: Exception) -> str:
    """What to do about an engine's failure, as far as its cause is known."""
    message = str(error).lower()
    if "memory" in message or "kv cache" in message:
        return (
            "lower sampling.vllm.max_model_len or sampling.batch_size, or give it more memory "
            "(sampling.vllm: gpu_memory_utilization, kv_cache_gib, tensor_parallel)"
        )
    return "`textalign doctor` shows what vLLM can do here; engine transformers runs such models too"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
