"""The worker behind `sampler.EndpointsSampler`: it tokenises text, and the servers generate tokens.

    python -m resources.engines.endpoints.worker '{"urls": ["http://gpu1:8000"], "dtype": "bfloat16", ...}'

A call is {"op": "generate" | "logprobs" | "version", ...}; for the protocol, see
`resources.workers.serving`. A result is {"rows": [...], "left_out": {url: why}}.

It holds no model. The servers take and return token ids, so text is tokenised in the same way as for all
engines, and each completion is a separate request with its own seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from resources.engines.endpoints.engine import Engine
from resources.engines.endpoints.servers import (
    EndpointError,
    Endpoints,
    Refused,
    Server,
    ServerFault,
    connected,
)
from resources.engines.endpoints.weights import scoring, token_logprobs
from resources.engines.text import Drawn, pairs_of, prompts_of
from resources.engines.vllm.requests import banned, completions, decoding, finite, seed_of, structure
from resources.workers.serving import CallError, Report, begin, quiet_transformers, serve
from textalign_dagster.settings.structured import WHERE

NEVER = -100.0  # the lowest bias that the API accepts; a banned token drawn all the same raises
LOST = -9999.0  # what a server sends instead of minus infinity

T = TypeVar("T")


def main() -> None:
    settings, calls, send = begin()
    quiet_transformers()
    engine = Engine(settings)
    send({"ready": {"device": "cpu"}})
    serve(calls, send, lambda call, report: answer(engine, call, report))


def answer(engine: Engine, call: dict[str, Any], report: Report) -> dict[str, Any]:
    """The rows of a call, and the servers left out; raises `CallError`."""
    from textalign_dagster.tokenisation import BannedTokenError

    try:
        if call["op"] == "version":
            return asyncio.run(with_servers(engine, versions))
        engine.read(Path(call["model"]), Path(call["adapter"]) if "adapter" in call else None)
        work = generate if call["op"] == "generate" else logprobs

        async def checked(endpoints: Endpoints) -> list[Any]:
            await engine.use(endpoints)
            report(0)
            return await work(engine, endpoints, call, report)

        return asyncio.run(with_servers(engine, checked))
    except EndpointError as error:
        raise CallError(str(error)) from error
    except BannedTokenError as error:
        raise CallError(f"{engine.folder}: {error}") from error


async def with_servers(
    engine: Engine, work: Callable[[Endpoints], Coroutine[Any, Any, list[Any]]]
) -> dict[str, Any]:
    """The result of ``work``, and the servers that were left out meanwhile."""
    settings, key = engine.settings, None
    if settings["api_key_env"] is not None:
        key = os.environ.get(settings["api_key_env"], "").strip()
        if not key:
            raise CallError(
                f"the environment variable {settings['api_key_env']} (sampling.endpoints.api_key_env) is not "
                "set; put the servers' key there"
            )
    async with connected(
        settings["urls"],
        key=key,
        timeout_s=settings["timeout_s"],
        connections=settings["batch_size"] * len(settings["urls"]),
    ) as endpoints:
        rows = await work(endpoints)
        return {"rows": rows, "left_out": endpoints.left_out}


async def versions(endpoints: Endpoints) -> list[Any]:
    """The vLLM version that all servers share, as the only row."""
    found: dict[str, str] = {}

    async def ask(server: Server) -> None:
        reply = await server.get("/version")
        if reply is None or "version" not in reply:
            raise ServerFault("it reports no vLLM version at /version", gone=False)
        found[server.url] = str(reply["version"])

    await endpoints.each(ask)
    if not found:
        raise endpoints.nobody()
    if len(set(found.values())) > 1:
        versions = ", ".join(f"{url} {version}" for url, version in found.items())
        raise EndpointError(
            f"sampling.endpoints.urls: servers with different vLLM versions ({versions}); use one version"
        )
    return list(found.values())[:1]


async def generate(
    engine: Engine, endpoints: Endpoints, call: dict[str, Any], report: Report
) -> list[list[dict[str, Any]]]:
    """For each request, one `sampler.Completion` per seed, as a dictionary."""
    common = decoding(engine, call["decoding"])
    prompts, never = prompts_of(engine, call), banned(engine, call)
    structured = structure(engine, call["decoding"])
    common |= {
        "n": 1,
        # A server takes whatever is not set here from its model's generation_config.json.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(token): NEVER for token in sorted(never)} or None,
        "structured_outputs": structured,
        "return_token_ids": True,
    }
    bodies = [
        {**common, "prompt": prompt, "seed": seed_of(seed)}
        for prompt, (_, seeds) in zip(prompts, call["requests"], strict=True)
        for seed in seeds
    ]

    def drawn(choice: dict[str, Any], _: int) -> Drawn:
        ids, terms = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or terms is None or len(ids) != len(terms):
            raise EndpointError(
                "a server returns no token ids; it must be vLLM, in a version that supports them"
            )
        if not never.isdisjoint(ids):
            raise EndpointError(f"{engine.folder}: a banned token was drawn; engine vllm rules it out")
        total = 0.0 if structured is not None else summed(engine, terms)
        return Drawn(ids, choice["finish_reason"] == "stop", total)

    if structured is None:
        return completions(engine, call, await every(engine, endpoints, bodies, drawn, report))
    try:
        found = await every(engine, endpoints, bodies, drawn, report)
    except Refused as error:
        raise EndpointError(f"{WHERE}: {error}") from None
    # The log-probs in these replies are relative to the tokens that the structure allows.
    sums = await text_logprobs(
        engine,
        endpoints,
        [body["prompt"] for body in bodies],
        [one.ids for one in found],
        lambda done: None,
    )
    rescored = (one._replace(logprob=total) for one, total in zip(found, sums, strict=True))
    return completions(engine, call, rescored)


async def logprobs(
    engine: Engine, endpoints: Endpoints, call: dict[str, Any], report: Report
) -> list[tuple[float, int]]:
    """For each (prompt, text): the sum of the log-probabilities of the text's tokens, and their number."""
    prompts, texts = pairs_of(engine, call)
    sums = await text_logprobs(engine, endpoints, prompts, texts, report)
    return list(zip(sums, map(len, texts), strict=True))


async def text_logprobs(
    engine: Engine,
    endpoints: Endpoints,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    report: Report,
) -> list[float]:
    """The summed log-probability of each text's tokens given its prompt; 0 for an empty text."""
    nonempty = [index for index, text in enumerate(texts) if text]
    empty = len(texts) - len(nonempty)

    def scored(choice: dict[str, Any], place: int) -> float:
        prompt, text = prompts[nonempty[place]], texts[nonempty[place]]
        return summed(engine, token_logprobs(choice, prompt + text, len(prompt)))

    bodies = [scoring(prompts[index] + texts[index][:-1], texts[index][-1]) for index in nonempty]
    sums = await every(engine, endpoints, bodies, scored, lambda done: report(empty + done))
    results = [0.0] * len(texts)
    for index, total in zip(nonempty, sums, strict=True):
        results[index] = total
    return results


async def every(
    engine: Engine,
    endpoints: Endpoints,
    bodies: Sequence[dict[str, Any]],
    read: Callable[[dict[str, Any], int], T],
    report: Report,
) -> list[T]:
    """The replies to the bodies, converted by ``read``, in order; many requests are in flight at once.

    A server that failed later may have answered with other weights: its requests are sent to others.
    """
    results: dict[int, T] = {}
    served_by: dict[int, Server] = {}
    pending = list(range(len(bodies)))
    while pending:
        left = iter(pending)

        async def work(left: Iterator[int] = left) -> None:
            for index in left:
                served_by[index], choice = await endpoints.complete(bodies[index])
                results[index] = read(choice, index)
                report(len(results))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(pending), engine.settings["batch_size"] * len(endpoints.live))):
                    group.create_task(work())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        await engine.unchanged(endpoints)
        pending = [index for index, server in served_by.items() if server.failed is not None]
        for index in pending:
            del results[index], served_by[index]
    return [results[index] for index in range(len(bodies))]


def summed(engine: Engine, terms: Sequence[float | None]) -> float:
    """The sum of the log-probabilities; raises `CallError` if one is missing or not finite."""
    good = [term for term in terms if term is not None and math.isfinite(term) and term > LOST]
    return finite(engine, math.fsum(good) if len(good) == len(terms) else math.nan)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
