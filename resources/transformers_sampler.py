"""The embedded engine: transformers in a worker process of its own. This side imports no torch.

    with TransformersSampler() as sampler:
        sampler.generate(Path("policy"), [Request("def f(x):", (1, 2))], Decoding(temperature=1))

The worker starts with the first call, serves any number of them, holds one model at a time, and is
gone, with its memory, when the sampler is closed, a call is interrupted, or this process dies.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from resources.sampler import Completion, Decoding, Progress, Request, SamplerError

LOOP_VERSION = 1  # to be raised with any change after which a seed gives another sample
CLOSE_SECONDS = 5.0  # for a worker to leave by itself
STDERR_TAIL = 2000  # characters shown of a worker that died


class TransformersSampler:
    """Samples from, and scores under, transformers causal language models; see `sampler.Sampler`.

    dtype: number format of the weights ("float32", "bfloat16", "float16").
    device: "auto" (a GPU if torch sees one), "cpu", "cuda", "cuda:1", …
    batch_size: sequences decoded together; it bounds the memory.
    threads: torch's threads; None is OMP_NUM_THREADS if set, else the processors of this process.
    """

    engine = "transformers"

    def __init__(
        self,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
        batch_size: int = 256,
        threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; give float32, bfloat16 or float16")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        self.settings = {
            "dtype": dtype,
            "device": device,
            "batch_size": batch_size,
            "trust_remote_code": trust_remote_code,
        }
        self.threads = threads
        self.on_accelerator = False  # known once the worker has started
        self._worker: Worker | None = None
        self._one_call = threading.Lock()

    @property
    def engine_version(self) -> str:
        """Versions of everything that a sample depends on, number format included."""
        names = ("transformers", "tokenizers", "torch")
        found = "+".join(f"{name}-{_version(name)}" for name in names)
        return f"{found}+loop-{LOOP_VERSION}+{self.settings['dtype']}"

    def generate(
        self,
        model: Path,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request, in the order of requests and of their seeds.

        The same call on the same machine, with the same number of threads, gives the same
        completions. In another batch, or on another machine, logits may differ in their last
        digits, and a sample with them once in many thousand tokens.
        """
        if not requests:
            return []
        rows = self._call(
            {
                "op": "generate",
                "model": str(_folder(model)),
                "requests": [(request.prompt, request.seeds) for request in requests],
                "decoding": asdict(decoding),
                "total": sum(len(request.seeds) for request in requests),
            },
            progress,
        )
        return [[Completion(**one) for one in row] for row in rows]

    def logprobs(
        self,
        model: Path,
        pairs: Sequence[tuple[str, str]],
        progress: Progress | None = None,
    ) -> list[tuple[float, int]]:
        """(log-probability of the text given the prompt, in nats; the text's tokens) of each pair.

        Neither the prompt's tokens nor an end token is counted; an empty text gives (0.0, 0).
        """
        if not pairs:
            return []
        call = {
            "op": "logprobs",
            "model": str(_folder(model)),
            "pairs": list(pairs),
            "total": len(pairs),
        }
        return [(total, count) for total, count in self._call(call, progress)]

    def close(self) -> None:
        """End the worker; a later call starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, call: dict[str, Any], progress: Progress | None) -> list[Any]:
        with self._one_call:
            try:
                if self._worker is None:
                    self._worker = Worker(self.settings, self.threads)
                    self.on_accelerator = self._worker.receive()["ready"]["device"] != "cpu"
                self._worker.send(call)
                while True:
                    message = self._worker.receive()
                    if "progress" in message:
                        if progress is not None:
                            progress(*message["progress"])
                    elif "error" in message:
                        break
                    else:
                        return list(message["result"])
            except BaseException:  # an interrupted call must not go on computing
                worker, self._worker = self._worker, None
                if worker is not None:
                    worker.kill()
                raise
        raise SamplerError(message["error"])


class Worker:
    """A worker process in its own process group, and the two ends of its channel.

    The thread that starts it also reads it until it ends: Linux' signal at the death of the parent
    goes by the thread that started a process, which must therefore not end before.
    """

    def __init__(self, settings: dict[str, Any], threads: int | None) -> None:
        self.settings, self.threads = settings, threads
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.process: subprocess.Popen[str]
        started: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self.reader = threading.Thread(
            target=self._read, args=(started,), name="sampling worker", daemon=True
        )
        self.reader.start()
        failure = started.get()
        if failure is not None:
            raise SamplerError(f"the sampling worker cannot be started: {failure}") from failure

    def _read(self, started: queue.SimpleQueue[OSError | None]) -> None:
        package = Path(__file__).resolve().parent
        threads = self.threads or os.environ.get("OMP_NUM_THREADS")
        paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            # Threads that spin while they wait make each other several times slower on busy cores.
            "GOMP_SPINCOUNT": "0",
            "OMP_NUM_THREADS": str(threads or _processors()),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not self.settings["trust_remote_code"]:
            environment["HF_HUB_OFFLINE"] = "1"  # models are local folders
        settings = json.dumps({**self.settings, "parent": os.getpid()})
        # -P: a folder named like this package in the working directory is not imported instead.
        command = [sys.executable, "-P", "-m", f"{package.name}.transformers_worker", settings]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=environment,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            started.put(error)
            return
        started.put(None)
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # a last line cut by the worker's death
            for line in self.process.stdout:
                self.messages.put(json.loads(line))
        self.messages.put(None)
        self.process.wait()

    def send(self, call: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> dict[str, Any]:
        """The next message; raises `SamplerError` when the worker has ended instead."""
        message = self.messages.get()
        if message is None:
            raise self._death()
        return message

    def close(self) -> None:
        """Let the worker end by itself, or kill it after `CLOSE_SECONDS`."""
        self._hang_up()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._release()

    def kill(self) -> None:
        """Kill the worker and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._hang_up()
        self._release()

    def _hang_up(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _release(self) -> None:
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.stderr.close()

    def _death(self) -> SamplerError:
        code = self.process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (often for lack of memory)" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - STDERR_TAIL))
        tail = self.stderr.read().decode(errors="replace").strip()
        return SamplerError(f"the sampling worker {how}; its last output: {tail or '(none)'}")


def _folder(model: Path) -> Path:
    folder = Path(model).absolute()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise SamplerError(f"model {folder} {what}; give a folder that save_pretrained() wrote")
    return folder


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise SamplerError(f"{name} is not installed; pip install {name}") from None


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
