"""Which weights a server has, and loading those of a policy into it.

A server is started with one model, but every iteration has another checkpoint. vLLM's development API
(VLLM_SERVER_DEV_MODE=1) loads a checkpoint's weights into a running server, and stores a name for them.
Without it, a server keeps the model that it was started with, and is used for that one only.

Names can be wrong, so the log-probabilities of a short text are compared as well: among the servers, with
those that transformers computes on this machine, and before and after samples are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.engines.endpoints.servers import EndpointError, Server, ServerFault
from resources.engines.sampler import SamplerError
from resources.engines.vllm.sampler import frame
from resources.workers.serving import reason
from textalign_dagster.ids import content_hash

TEXT = "Whether these weights are those of the policy is told by how likely they find these words."
PROBED = 32  # maximum number of its tokens
APART = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.1}
"""Number format → how much two programs with the same weights may differ, in nats per token."""
ALIKE = {"float32": 0.001, "float16": 0.01, "bfloat16": 0.01}
"""The same for one server that is probed twice."""
REMEDY = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, or with this folder as its model"


def label_of(folder: Path, files: object) -> str:
    """The name under which a server stores the weights of a folder with these files."""
    return f"{folder}#{content_hash('weights', str(files))}"


async def have(server: Server, folder: Path, label: str) -> None:
    """Ensure that a server has a folder's weights; sets the server's ``model`` and ``room``.

    Raises:
        ServerFault: it refuses them, with a reason; others may accept them.
    """
    served = await server.get("/v1/models")
    try:
        (own,) = [entry for entry in served["data"] if entry.get("parent") is None][:1]
        server.model, root, server.room = own["id"], str(own["root"]), int(own["max_model_len"])
    except (TypeError, KeyError, ValueError):
        raise ServerFault(
            "it does not report what it serves at /v1/models, as vLLM does", gone=False
        ) from None
    info = await server.get("/weight_info")
    if info is None:
        if Path(root).resolve() != folder.resolve():
            raise ServerFault(
                f"it serves {root}, not {folder}, and cannot be given other weights; {REMEDY}", gone=False
            )
        return
    if info["weight_version"] != label:
        _fits(root, folder)
        await give(server, folder, label)


async def give(server: Server, folder: Path, label: str) -> None:
    """Load a folder's weights into a server."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    if await server.post("/collective_rpc", body) is None:
        raise ServerFault(f"it cannot be given other weights; {REMEDY}", gone=False)
    # The new weights must not reuse keys and values that the old ones computed.
    await server.post("/reset_prefix_cache")
    await server.post("/update_weight_version", {"new_version": label})


async def still_has(server: Server, label: str) -> bool:
    """Whether the weights still have the name they were given; True for a server without names."""
    info = await server.get("/weight_info")
    return info is None or info["weight_version"] == label


async def probe(server: Server, ids: Sequence[int]) -> list[float]:
    """A server's log-probability of each token but the first."""
    choice = read_choice(
        await server.post("/v1/completions", {"model": server.model, **scoring(list(ids[:-1]), ids[-1])})
    )
    return token_logprobs(choice, list(ids), 1)


def scoring(read: list[int], last: int) -> dict[str, Any]:
    """A request for the log-probabilities of the tokens ``read``, and of ``last`` after them.

    vLLM always generates at least one token, so the last token is not part of the prompt: its
    log-probability is requested at the position that is generated.
    """
    return {
        "prompt": read,
        "temperature": 0.0,
        "max_tokens": 1,
        "prompt_logprobs": 0,
        "logprobs": 0,
        "logprob_token_ids": [last],
        "return_tokens_as_token_ids": True,
        "repetition_penalty": 1.0,
    }


def token_logprobs(choice: dict[str, Any], ids: Sequence[int], first: int) -> list[float]:
    """The log-probabilities of the tokens from ``first`` on, in the reply to `scoring(ids[:-1], ids[-1])`."""
    try:
        places = choice["prompt_logprobs"][first:]
        terms = [place[str(token)]["logprob"] for place, token in zip(places, ids[first:-1], strict=True)]
        return [*terms, choice["logprobs"]["top_logprobs"][0][f"token_id:{ids[-1]}"]]
    except (TypeError, KeyError, IndexError, ValueError):
        raise EndpointError(
            "a server returns no log-probabilities of a prompt; it must be vLLM, in the version that is "
            "installed with this package (docs/sampling.md)"
        ) from None


def read_choice(reply: Any) -> dict[str, Any]:
    """The only choice in a completions reply."""
    if reply is None or not reply.get("choices"):
        raise ServerFault("it returns no completion at /v1/completions", gone=False)
    return dict(reply["choices"][0])


def reference(
    folder: Path, dtype: str, trust_remote_code: bool, ids: Sequence[int], adapter: Path | None = None
) -> list[float]:
    """The log-probability of each token but the first, by transformers on this machine's CPU.

    Args:
        adapter: a folder that peft wrote, applied on top of the folder's weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
    except Exception as error:
        raise EndpointError(
            f"{adapter or folder} cannot be loaded to compare it with what is served ({reason(error)}); fix it, or set "
            "sampling.endpoints.verify: false"
        ) from error
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([list(ids)])).logits[0, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor([list(ids[1:])]).T)
    return [float(value) for value in chosen[:, 0]]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The mean absolute difference of two lists of log-probabilities, in nats per token."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))


def _fits(root: str, folder: Path) -> None:
    """Raises `ServerFault` if weights do not fit a server: loading them would kill it."""
    if not (Path(root) / "config.json").is_file():
        raise ServerFault(
            f"it serves {root}, which is not a folder on this machine, so it is unknown whether the weights "
            f"of {folder} fit; start it with a folder that both can read",
            gone=False,
        )
    try:
        fits = frame(Path(root)) == frame(folder)
    except SamplerError as error:
        raise EndpointError(str(error)) from None
    if not fits:
        raise ServerFault(
            f"it serves {root}, whose config or weight shapes are not those of {folder}; start another "
            "server with that folder (a method that adds tokens needs one for the base policy and one for "
            "its checkpoints)",
            gone=False,
        )
