"""Running vLLM servers: requests go to the least busy one, and one that fails is left out.

    async with Endpoints(urls, key=None, timeout_s=600, connections=256) as endpoints:
        server, choice = await endpoints.complete({"prompt": [1, 2, 3], "max_tokens": 8})

Imported only by the worker: it requires the openai package.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from resources.backoff import RETRIED_STATUSES, jitter

FAULTS = 3  # failures in a row after which a server is left out
HOPELESS = 6  # failures of one request, while its server answers others, after which the request is blamed
BASE_S, CAP_S = 0.5, 5.0  # bounds of the wait after a failure


class EndpointError(Exception):
    """The servers cannot do what is needed; the message is for the user."""


class Refused(EndpointError):
    """A server refuses a request because of its content."""


class ServerFault(Exception):
    """A server has failed; another one may be tried. ``gone``: it does not respond at all."""

    def __init__(self, message: str, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


@dataclass
class Server:
    """The state of one server during one call."""

    url: str
    client: openai.AsyncOpenAI
    timeout_s: float
    model: str = ""  # the name under which it serves
    room: int = 0  # maximum number of tokens of prompt and completion together
    flying: int = 0  # requests without a reply so far
    answered: int = 0
    faults: int = 0  # in a row
    failed: str | None = None  # why it is left out

    async def get(self, path: str) -> Any:
        """The JSON at a path; None: there is no such path."""
        return await self._answer(self.client.get(path, cast_to=httpx2.Response))

    async def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The reply to a body; None: there is no such path.

        Raises:
            ServerFault: it failed.
            EndpointError: it refuses the request.
        """
        return await self._answer(self.client.post(path, cast_to=httpx2.Response, body=body or {}))

    async def tell(self, path: str, body: dict[str, Any]) -> bool:
        """Post a body and ignore the reply; returns whether the path exists. Raises like `post`."""
        request = self.client.post(path, cast_to=httpx2.Response, body=body)
        return await self._answer(request, read=lambda content: True) is not None

    async def _answer(
        self, request: Awaitable[httpx2.Response], read: Callable[[bytes], Any] = json.loads
    ) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await request
            return read(response.content or b"{}")
        except (TimeoutError, openai.APITimeoutError):
            raise ServerFault(f"no reply within {self.timeout_s:g} s", gone=True) from None
        except openai.APIStatusError as error:
            message = " ".join(str(error.message).split()).removeprefix(
                f"Error code: {error.status_code} - "
            )[:400]
            if error.status_code == 404:
                return None
            if error.status_code >= 500 or error.status_code in (429, *RETRIED_STATUSES):
                raise ServerFault(f"HTTP {error.status_code}: {message}", gone=False) from None
            remedy = (
                "; check the key in sampling.endpoints.api_key_env" if error.status_code in (401, 403) else ""
            )
            raise Refused(
                f"{self.url} refuses a request (HTTP {error.status_code}: {message}){remedy}"
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raise ServerFault(f"no connection ({type(cause).__name__}: {cause})", gone=True) from None
        except ValueError:
            raise ServerFault("its reply is not JSON", gone=False) from None


class Endpoints:
    """The servers of a call; those that fail are left out until it is over."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = list(servers)

    @property
    def live(self) -> list[Server]:
        return [server for server in self.servers if server.failed is None]

    @property
    def left_out(self) -> dict[str, str]:
        """URL → why."""
        return {server.url: server.failed for server in self.servers if server.failed is not None}

    async def complete(self, body: dict[str, Any]) -> tuple[Server, dict[str, Any]]:
        """The only choice of a completion, and the server that returned it (the least busy one that could).

        Raises:
            EndpointError: no server is left, or the request is at fault.
        """
        hopeless = 0  # times that it failed while its server answered other requests
        while True:
            server = self._least_busy()
            server.flying += 1
            before = server.answered
            try:
                choice = _choice(await server.post("/v1/completions", {"model": server.model, **body}))
                server.answered, server.faults = server.answered + 1, 0
                return server, choice
            except ServerFault as fault:
                server.faults += 1
                if server.answered > before and not fault.gone:
                    hopeless += 1
                    if hopeless >= HOPELESS:
                        raise EndpointError(
                            f"{server.url} answers other requests, but one with {len(body.get('prompt', ''))} prompt "
                            f"tokens failed {hopeless} times, the last time with: {fault}; see the server's log, or "
                            "sample without this prompt"
                        ) from None
                elif fault.gone or server.faults >= FAULTS:
                    # A server that is gone may come back with its initial weights: not used again within this call.
                    server.failed = server.failed or str(fault)
            finally:
                server.flying -= 1
            if self.live:
                await asyncio.sleep(0 if server.failed else jitter(server.faults, BASE_S, CAP_S))

    async def each(self, function: Callable[[Server], Awaitable[None]]) -> None:
        """Run ``function`` on all live servers concurrently; those on which it fails are left out."""

        async def careful(server: Server) -> None:
            try:
                await function(server)
            except ServerFault as fault:
                server.failed = str(fault)

        await asyncio.gather(*map(careful, self.live))

    def nobody(self) -> EndpointError:
        """The error when all servers are left out."""
        why = "; ".join(f"{url}: {reason}" for url, reason in self.left_out.items())
        return EndpointError(
            f"no server of sampling.endpoints.urls can be used ({why}); fix or start them and run this "
            "again: finished chunks are kept"
        )

    def _least_busy(self) -> Server:
        live = self.live
        if not live:
            raise self.nobody()
        return min(live, key=lambda server: (server.flying, server.answered))


@asynccontextmanager
async def connected(
    urls: Sequence[str], *, key: str | None, timeout_s: float, connections: int
) -> AsyncIterator[Endpoints]:
    """The servers at these URLs, with connections that are closed afterwards."""
    # Headers that the library takes from the environment are for another endpoint.
    foreign = {name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}
    servers = [
        Server(
            url,
            openai.AsyncOpenAI(
                api_key=key or "none",
                base_url=url,
                default_headers=foreign,  # type: ignore[arg-type]  # it leaves these out
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(
                    limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
                    timeout=timeout_s,
                    follow_redirects=False,
                ),
            ),
            timeout_s,
        )
        for url in urls
    ]
    try:
        yield Endpoints(servers)
    finally:
        for server in servers:
            await server.client.close()


def _choice(reply: Any) -> dict[str, Any]:
    try:
        choice: dict[str, Any] = reply["choices"][0]
        finished = choice["finish_reason"] in ("stop", "length")
    except (TypeError, KeyError, IndexError):
        raise ServerFault("its reply is not a completion", gone=False) from None
    if not finished:  # aborted
        raise ServerFault(f"a completion ended with {choice['finish_reason']!r}", gone=False)
    return choice
