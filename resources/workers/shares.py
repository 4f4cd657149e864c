"""Several workers at once, each with its own GPUs: a call is split among them, and its results merged."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from resources.workers.channel import Channel, Progress

T = TypeVar("T")


def shares(items: Sequence[T], parts: int) -> list[list[T]]:
    """Items dealt round-robin, so that neighbours, which are often similar in length, are spread."""
    return [list(items[part::parts]) for part in range(parts)]


def together(parts: Sequence[Sequence[T]]) -> list[T]:
    """The items that were dealt by :func:`shares`, in their original order."""
    every: list[T] = [parts[0][0]] * sum(map(len, parts)) if any(parts) else []
    for index, part in enumerate(parts):
        every[index :: len(parts)] = part
    return every


def visible_devices(count: int, each: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of ``count`` workers with ``each`` GPUs.

    Raises:
        ValueError: fewer are visible to this process.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(index) for index in range(count * each)]
    if len(devices) < count * each:
        raise ValueError(
            f"{count} engines of {each} GPUs need {count * each}, but CUDA_VISIBLE_DEVICES={given}; lower "
            "sampling.vllm.data_parallel or sampling.vllm.tensor_parallel"
        )
    return [",".join(devices[i * each : (i + 1) * each]) for i in range(count)]


def call_all(
    channels: Sequence[Channel], calls: Sequence[dict[str, Any]], progress: Progress | None
) -> list[Any]:
    """The results of the calls, one per channel, made concurrently.

    ``progress`` is called in this thread with sums over the calls. When one of them fails, or this
    thread is interrupted, all workers are stopped.
    """
    if len(channels) == 1:
        return [channels[0].call(calls[0], progress)]
    events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    done = [0] * len(calls)
    results: list[Any] = [None] * len(calls)
    failures: list[BaseException] = []
    total = sum(call["total"] for call in calls)

    def work(index: int) -> None:
        def report(finished: int, _: int) -> None:
            events.put(lambda: done.__setitem__(index, finished))

        try:
            results[index] = channels[index].call(calls[index], report)
        except BaseException as error:  # noqa: BLE001 (raised in the caller's thread)
            failures.append(error)
        finally:
            events.put(None)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    try:
        left = len(threads)
        while left and not failures:
            event = events.get()
            if event is None:
                left -= 1
                continue
            event()
            if progress is not None:
                progress(sum(done), total)
        if failures:
            raise failures[0]
        return results
    except BaseException:
        for channel in channels:
            channel.close()
        raise
    finally:
        for thread in threads:
            thread.join()
