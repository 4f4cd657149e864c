"""``textalign`` that appends a line to a file for each worker it starts: ``counted.py FILE run …``."""

import sys
from pathlib import Path
from typing import Any

from resources.workers import channel as worker
from tests.integration import quick
from textalign_dagster.cli.main import main

if __name__ == "__main__":
    quick.install()
    log = Path(sys.argv.pop(1))
    start = worker.Worker.__init__

    def counted(self: Any, channel: worker.Channel) -> None:
        with log.open("a") as stream:
            stream.write(f"{channel.module}\n")
        start(self, channel)

    worker.Worker.__init__ = counted  # type: ignore[method-assign]
    main()
