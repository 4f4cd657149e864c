"""The code location with toy engines: real assets, checks, store and automation; nothing is learned.

An iteration takes about a second instead of a minute, as the tests of Dagster's side
(UI, daemon, queue) need. Run by `dagster dev` through the workspace.yaml that dev_server.py writes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from resources.compute.processes import Supervised
from resources.configured import SamplerResource, StoreResource
from resources.engines.sampler import Completion, Decoding, Progress, Request
from resources.launchers.launcher import Launched, LocalLauncher, Work
from textalign_dagster import automation
from textalign_dagster.automation import iteration_job, next_iteration
from textalign_dagster.definitions import LOOP
from textalign_dagster.experiment import Experiment

LINES = ["    x = 1", "    return x", "    y=2;", "    print( x )", "    if x :", "        pass"]


class ToySampler:
    """Generates lines of Python determined by the prompt, the seed and the policy's ``toy.json``."""

    engine = "toy"
    engine_version = "1"
    on_accelerator = False
    load_seconds = 0.0

    def generate(
        self,
        model: Path,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        trained = _trained(model)
        return [[_completion(trained, r.prompt, seed) for seed in r.seeds] for r in requests]

    def logprobs(
        self, model: Path, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[tuple[float, int]]:
        return [(-2.0 * len(text.split()), len(text.split())) for _, text in pairs]


class ToySamplers(SamplerResource):
    """Gives every experiment the toy sampler."""

    def of(self, experiment: Experiment) -> Any:
        return ToySampler()

    def make_room(self) -> None:
        pass


class ToyLauncher(LocalLauncher):
    """Copies the policy and counts its trainings; a file ``slow`` in the home makes it hang, ``fail`` makes it fail."""

    def train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        started, out = time.monotonic(), work.folder("model")
        job = json.loads(Path(work.write(work.place)[-1]).read_text())
        if (Path(os.environ["TEXTALIGN_HOME"]) / "fail").exists():
            raise dg.Failure("the toy trainer was told to fail")
        if (Path(os.environ["TEXTALIGN_HOME"]) / "slow").exists():
            # Two processes, like a trainer; a cancelled run must end both.
            child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(601)'])"
            trainer = Supervised([sys.executable, "-c", child], env={}, grace=2.0, stdout=subprocess.DEVNULL)
            try:
                trainer.wait()
            finally:
                trainer.stop()
        policy = Path(job["policy"])
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (out / name).write_bytes((policy / name).read_bytes())
        trained = {"trainings": _trained(policy) + 1, "seed": job["seed"]}
        (out / "toy.json").write_text(json.dumps(trained))
        work.on_progress({"done": 2, "total": 2, "loss": 1.5, "tokens_per_s": 1000.0, "lr": 1e-3})
        facts = {
            "steps": 2,
            "rows": 8,
            "tokens": 256,
            "final_loss": 1.5,
            "losses": [2.0, 1.5],
            "resumed_at": [],
            "earlier_seconds": 0.0,
            "tokens_per_s": 2560.0,
            "seconds": {"load": 0.1, "train": 0.1, "save": 0.1},
            "first_step_seconds": 0.05,
            "accelerators": 0,
            "peak_memory": None,
            "coefficients": {},
            "measured": {},
        }
        (out / "done.json").write_text(json.dumps(facts))
        return Launched(time.monotonic() - started, facts)


def _trained(policy: Path) -> int:
    marker = policy / "toy.json"
    return int(json.loads(marker.read_text())["trainings"]) if marker.exists() else 0


def _completion(trained: int, prompt: str, seed: int) -> Completion:
    chance = random.Random(f"{trained} {prompt} {seed}")
    lines = chance.choices(LINES, weights=[2 + trained, 2 + trained, 2, 2, 2, 1], k=4)
    text = "\n" + "\n".join(f"{line}  # {chance.randrange(100)}" for line in lines)
    return Completion(text, 16, "length", -30.0)


@dg.sensor(job=iteration_job, minimum_interval_seconds=3)
def advance(context: dg.SensorEvaluationContext) -> Any:
    """The project's own sensor, evaluated more often."""
    yield from automation.advance(context)


defs = dg.Definitions(
    assets=LOOP,
    jobs=[iteration_job],
    schedules=[next_iteration],
    sensors=[advance],
    executor=dg.in_process_executor,
    resources={"store": StoreResource(), "sampler": ToySamplers(), "launcher": ToyLauncher()},
)
