"""The entry point of a worker's pod: it waits for a first line, then becomes the worker.

    python -P -c TEXT '{"transformers": "5.19.0"}' COMMAND…

A container's output is lost until a client is attached; so nothing happens before a first line has arrived.
A pod that never gets one ends, and frees its node.

Its source is sent along, so it runs in images with any version of textalign, and imports none of it.
"""

import json
import os
import select
import sys
from importlib.metadata import PackageNotFoundError, version

ALONE = 600.0  # seconds without input after which it ends


def main() -> str:
    if not select.select([0], [], [], ALONE)[0]:
        return f"this pod was not used for {ALONE:.0f} s; it ends"
    while (byte := os.read(0, 1)) != b"\n":  # byte by byte: what follows is the worker's
        if not byte:
            return "the process that created this pod is gone; it ends"
    expected, command = json.loads(sys.argv[1]), sys.argv[2:]
    other = [
        f"{name} {there} and not {here}"
        for name, here in expected.items()
        if (there := installed(name)) != here
    ]
    if other:
        return (
            f"the image has {', '.join(other)}, unlike the environment where Dagster runs, whose versions would be "
            "recorded: use an image with the same versions"
        )
    os.execvp(command[0], command)


def installed(name: str) -> str | None:
    """Version of a distribution, without its local part (+cpu, +cu130)."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
