"""One request to an endpoint: admitted, sent, its reply priced or its fault told apart."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import httpx2
import openai

from resources.judges.api_key import ApiKey
from resources.judges.call import Completion, Request, read_completion
from resources.judges.course import Course, Recorder
from resources.judges.gate import Gate
from resources.judges.retry import classify
from resources.judges.tally import Tally
from textalign_dagster.settings.judge import Judge


class Sender:
    """Makes the attempts of a batch's calls."""

    def __init__(self, judge: Judge, key: ApiKey, gate: Gate, recorder: Recorder, tally: Tally) -> None:
        self._judge = judge
        self._gate = gate
        self._recorder = recorder
        self._tally = tally
        self._headers = key.headers(judge)
        self._params = judge.decoding.params()

    async def attempt(self, course: Course, client: openai.AsyncOpenAI) -> bool:
        """One request, as soon as limits and budget admit it: a completion, or else a fault."""
        admitted = await self._gate.admit(course.request)
        usd, lost, used = 0.0, True, float(admitted.tokens)  # unless something better is known
        try:
            course.sent += 1
            course.fault = None
            course.called_at = course.called_at or datetime.now(UTC)
            self._recorder.sent(course)
            self._tally.requests += 1
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._judge.limits.timeout_s):
                    # What `client.chat.completions.create` does, without a third of its time: that goes
                    # into checking the messages against their types.
                    response = await client.post(
                        "/chat/completions",
                        cast_to=httpx2.Response,
                        body=self._body(course.request),
                        options={"headers": self._headers},
                    )
                course.completion = read_completion(response.content)
            except Exception as error:
                course.fault = classify(error, self._judge.limits.timeout_s)
                if course.fault is None:
                    raise
                lost = course.fault.lost
                used = used if lost else 0.0
                if isinstance(error, openai.APIStatusError):
                    self._gate.heed(error.response.headers, admitted)
                return False
            finally:
                course.seconds = time.monotonic() - started
            lost = False
            self._gate.replied()
            counted = (course.completion.tokens_in or 0) + (course.completion.tokens_out or 0)
            used = float(counted or admitted.tokens)
            if self._judge.prices is not None:
                usd = course.usd = self._price(course.completion, admitted.usd)
            self._tally.usd += usd
            self._gate.heed(response.headers, admitted)
            return True
        finally:
            if lost:
                course.lost += 1
                self._tally.lost += 1
            self._gate.settle(admitted, used, usd, lost)

    def _body(self, request: Request) -> dict[str, Any]:
        body = {"model": self._judge.model, "messages": list(request.call.messages), **self._params}
        if request.response_format is not None:
            body["response_format"] = request.response_format
        return body

    def _price(self, got: Completion, highest: float) -> float:
        """USD of a reply; the highest it can be where the endpoint counts no tokens."""
        assert self._judge.prices is not None
        if got.tokens_in is None or got.tokens_out is None:
            return highest
        return self._judge.prices.usd(
            got.tokens_in, got.tokens_out, min(got.tokens_cached or 0, got.tokens_in)
        )
