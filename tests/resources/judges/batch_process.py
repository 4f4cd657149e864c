"""A process that makes judge calls, for tests to kill: ``batch_process.py URL STORE CALLS [CONCURRENCY]``.

Prints "begun", then "finished" or why it stopped. All libraries log at DEBUG.
"""

from __future__ import annotations

import logging
import sys

from resources.judges.client import Call, judge_calls
from resources.judges.errors import JudgeError
from resources.judges.ledger import Ledger
from resources.store import ArtifactStore
from textalign_dagster.settings.judge import Judge, JudgeLimits


def prompts(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def main(url: str, store: str, count: str, concurrency: str = "8") -> None:
    logging.basicConfig(level=logging.DEBUG)
    judge = Judge(
        model="judge-1",
        template="any",
        base_url=url,
        api_key_env="CANARY_KEY",
        limits=JudgeLimits(concurrency=int(concurrency)),
    )
    calls = [Call([{"role": "user", "content": prompt}]) for prompt in prompts(int(count))]
    with Ledger(ArtifactStore(store)) as ledger:
        print("begun", flush=True)
        try:
            judge_calls(calls, judge, ledger, lambda *step: print("progress", *step, flush=True))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        except JudgeError as error:
            print("stopped", error, repr(error), flush=True)
        else:
            print("finished", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
