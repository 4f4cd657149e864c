"""``textalign`` that appends a line to a file for each call to a worker: ``called.py FILE run …``.

A line is JSON: {"worker": module, "pid": its process, "model": …, "adapter": …}.
"""

import json
import sys
from pathlib import Path
from typing import Any

from resources.workers import channel as worker
from tests.integration import quick
from textalign_dagster.cli.main import main

if __name__ == "__main__":
    quick.install()
    log = Path(sys.argv.pop(1))
    send = worker.Worker.send

    def log_and_send(self: worker.Worker, call: Any) -> None:
        line = {"worker": self.channel.module, "pid": self.process.pid}
        with log.open("a") as stream:
            stream.write(
                json.dumps({**line, "model": call.get("model"), "adapter": call.get("adapter")}) + "\n"
            )
        send(self, call)

    worker.Worker.send = log_and_send  # type: ignore[method-assign]
    main()
