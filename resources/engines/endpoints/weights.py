"""Which weights a server has, and having those of a policy put into it.

A server is started with one model, but every iteration has another checkpoint. vLLM's interface for
development (VLLM_SERVER_DEV_MODE=1) puts a checkpoint's weights into a running server, and keeps a name
for them. Without it, a server has the model that it was started with, and is used for that one only.

Names can be wrong, so log-probabilities are compared, too: of a short text, among the servers, with those
that transformers gives on this machine, and before and after samples are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.engines.endpoints.servers import EndpointError, Server, ServerFault
from resources.engines.sampler import SamplerError
from resources.engines.vllm.sampler import frame
from textalign_dagster.ids import content_hash

TEXT = "Whether these weights are those of the policy is told by how likely they find these words."
PROBED = 32  # tokens of it, at most
APART = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.1}
"""Number format → how far, in nats a token, two programs may be from each other with the same weights."""
ALIKE = {"float32": 0.001, "float16": 0.01, "bfloat16": 0.01}
"""The same for one server that is asked twice."""
REMEDY = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, or with this folder as its model"


def label_of(folder: Path, files: object) -> str:
    """The name under which a server keeps the weights of a folder with these files."""
    return f"{folder}#{content_hash('weights', str(files))}"


async def have(server: Server, folder: Path, label: str) -> None:
    """See to it that a server has a folder's weights; sets the server's ``model`` and ``room``.

    Raises:
        ServerFault: it refuses them, with a reason; others may accept them.
    """
    served = await server.get("/v1/models")
    try:
        (own,) = [entry for entry in served["data"] if entry.get("parent") is None][:1]
        server.model, root, server.room = own["id"], str(own["root"]), int(own["max_model_len"])
    except (TypeError, KeyError, ValueError):
        raise ServerFault("it does not say what it serves, as vLLM does at /v1/models", gone=False) from None
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
    """Put a folder's weights into a server."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    if await server.post("/collective_rpc", body) is None:
        raise ServerFault(f"it cannot be given other weights; {REMEDY}", gone=False)
    # What the old weights made of a prompt must not be read by the new ones.
    await server.post("/reset_prefix_cache")
    await server.post("/update_weight_version", {"new_version": label})


async def still_has(server: Server, label: str) -> bool:
    """Whether the weights have still the name they were given; without names, that is taken for granted."""
    info = await server.get("/weight_info")
    return info is None or info["weight_version"] == label


async def probe(server: Server, ids: Sequence[int]) -> list[float]:
    """The log-probability that a server gives to each of some tokens but the first."""
    choice = read_choice(
        await server.post("/v1/completions", {"model": server.model, **scoring(list(ids[:-1]), ids[-1])})
    )
    return token_logprobs(choice, list(ids), 1)


def scoring(read: list[int], last: int) -> dict[str, Any]:
    """A request for the log-probabilities of tokens that are read, and of one that may follow.

    vLLM always generates at least one token: so the last token is not read, but requested
    at the place where a token is generated.
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
    """The log-probabilities of the tokens from ``first`` on, in the answer to `scoring` (ids[:-1], ids[-1])."""
    try:
        places = choice["prompt_logprobs"][first:]
        terms = [place[str(token)]["logprob"] for place, token in zip(places, ids[first:-1], strict=True)]
        return [*terms, choice["logprobs"]["top_logprobs"][0][f"token_id:{ids[-1]}"]]
    except (TypeError, KeyError, IndexError, ValueError):
        raise EndpointError(
            "a server gives no log-probabilities of a prompt; it must be vLLM, of the version that is "
            "installed with this package (docs/sampling.md)"
        ) from None


def read_choice(reply: Any) -> dict[str, Any]:
    """The only choice in the answer to a request for completions."""
    if reply is None or not reply.get("choices"):
        raise ServerFault("it completes nothing at /v1/completions", gone=False)
    return dict(reply["choices"][0])


def reference(
    folder: Path, dtype: str, trust_remote_code: bool, ids: Sequence[int], adapter: Path | None = None
) -> list[float]:
    """What transformers gives, on this machine's CPU, to each of some tokens but the first.

    Args:
        adapter: beside the folder's weights, by peft.
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
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise EndpointError(
            f"{adapter or folder} cannot be loaded to compare it with what is served ({said}); fix it, or set "
            "sampling.endpoints.verify: false"
        ) from error
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([list(ids)])).logits[0, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor([list(ids[1:])]).T)
    return [float(value) for value in chosen[:, 0]]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two computations are from each other, in nats a token."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))


def _fits(root: str, folder: Path) -> None:
    """Weights that do not fit would end the server."""
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
            f"it serves {root}, whose config or shapes of weights are not those of {folder}; start another "
            "server with that folder (a method that adds tokens needs one for the base policy and one for "
            "its checkpoints)",
            gone=False,
        )
