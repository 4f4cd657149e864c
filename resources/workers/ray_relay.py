"""A command on a node of a Ray cluster, with its stdin and stdout here: what `srun` is for Slurm.

    python -m resources.workers.ray_relay '{"address": "auto", "cpus": 1, "gpus": 0, "resources": {}, "environment": {}}' COMMAND…

An actor reserves the command's resources and relays its lines. The command ends with its stdin, and so
with the actor, which ends with this process: Ray lets no actor outlive the driver that created it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any, BinaryIO

CHUNK = 2**20  # bytes relayed at a time
TAIL = 4000  # bytes of its stderr that are shown when it has ended
REFUSED = 2  # exit code: the cluster cannot run the command


class Carrier:
    """The command's process on its node. Defined in ``__main__``, so Ray ships it by value: nodes need not import it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the actor)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env={**os.environ, **environment},
        )

    def write(self, data: bytes) -> None:
        """Writes data to its stdin; empty data closes it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush() if data else self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, as `end` reports

    def read(self) -> bytes:
        """Data from its stdout; empty once it is closed."""
        assert self.process.stdout is not None
        return self.process.stdout.read1(CHUNK)  # type: ignore[attr-defined, no-any-return]

    def end(self) -> tuple[int, bytes]:
        """Its exit code, and the end of its stderr."""
        code = self.process.wait()
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - TAIL))
        return code, self.stderr.read()


def main() -> int:
    settings, command = json.loads(sys.argv[1]), sys.argv[2:]
    # What Ray prints goes to stderr.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import ray

    try:
        ray.init(
            address=settings["address"],
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:  # noqa: BLE001 (of many kinds)
        print(f"Ray cannot be reached at {settings['address']}: {error}", file=sys.stderr)
        return REFUSED
    required = {"CPU": settings["cpus"], "GPU": settings["gpus"], **settings["resources"]}
    list_nodes: Any = ray.nodes  # untyped
    nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= much for name, much in required.items()) for node in nodes):
        print(f"no node of the Ray cluster has {json.dumps(required)}; they have {nodes}", file=sys.stderr)
        return REFUSED
    actor: Any = (
        ray.remote(Carrier)
        .options(
            num_cpus=settings["cpus"],
            num_gpus=settings["gpus"],
            resources=settings["resources"],
            max_concurrency=3,  # to write, to read and to wait
        )
        .remote(command, settings["environment"])
    )
    threading.Thread(target=carry, args=(source, actor), daemon=True).start()
    while data := ray.get(actor.read.remote()):
        sink.write(data)
        sink.flush()
    code: int
    code, stderr = ray.get(actor.end.remote())
    sys.stderr.buffer.write(stderr)
    return code if code >= 0 else 128 - code


def carry(source: BinaryIO, actor: Any) -> None:
    """Forwards stdin to the actor, and its end."""
    import ray

    for line in source:
        for start in range(0, len(line), CHUNK):
            ray.get(actor.write.remote(line[start : start + CHUNK]))
    ray.get(actor.write.remote(b""))


if __name__ == "__main__":
    sys.exit(main())
