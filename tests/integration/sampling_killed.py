"""Draws a cell's prompts and samples, and logs each call to the engine: ``sampling_killed.py LOG CALL CELL``.

LOG gets a line for every call to the engine: the number of completions requested. In call number CALL
(0: in none) this process kills itself as soon as the engine has started to work.
"""

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.engines.sampler import Request
from resources.engines.transformers.sampler import TransformersSampler

if __name__ == "__main__":
    log, last, cell = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    generate, calls = TransformersSampler.generate, list[int]()

    def counted(self: TransformersSampler, model: Path, requests: Sequence[Request], *more: Any) -> Any:
        calls.append(sum(len(request.seeds) for request in requests))
        with log.open("a") as stream:
            stream.write(f"{calls[-1]}\n")
        if len(calls) != last:
            return generate(self, model, requests, *more)
        return generate(self, model, requests, more[0], lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    TransformersSampler.generate = counted  # type: ignore[method-assign]
    for stage in ("prompt_draws", "generations"):
        sys.argv[1:] = [cell, stage]
        runpy.run_path(str(Path(__file__).with_name("one_stage.py")), run_name="__main__")
