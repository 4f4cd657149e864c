"""``textalign`` that kills itself (SIGKILL) at a chosen moment: ``killed_at.py MOMENT run …``.

The moments are patched in here; the product knows nothing of them.
"""

import os
import signal
import sys
from dataclasses import replace
from typing import Any

from resources.engines.transformers.sampler import TransformersSampler
from resources.launchers.launcher import LocalLauncher
from resources.store import ArtifactStore
from textalign_dagster.cli.main import main


def die(*_: Any) -> None:
    """Like the kernel's out-of-memory killer: no cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


def while_generating() -> None:
    generate = TransformersSampler.generate
    TransformersSampler.generate = (  # type: ignore[method-assign]
        lambda self, model, requests, decoding, progress=None: generate(self, model, requests, decoding, die)
    )


def while_training() -> None:
    """In its last step, when snapshots exist."""
    train = LocalLauncher.train

    def die_at_the_end(progress: dict[str, Any]) -> None:
        if progress["done"] == progress["total"]:
            die()

    LocalLauncher.train = (  # type: ignore[method-assign]
        lambda self, context, work: train(self, context, replace(work, on_progress=die_at_the_end))
    )


def interrupted_while_generating() -> None:
    generate = TransformersSampler.generate

    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C

    TransformersSampler.generate = (  # type: ignore[method-assign]
        lambda self, model, requests, decoding, progress=None: generate(
            self, model, requests, decoding, interrupt
        )
    )


def before_the_manifest(stage: str) -> None:
    """All files of the attempt are written, but not the manifest, without which it does not exist."""
    publish = ArtifactStore._publish
    ArtifactStore._publish = (  # type: ignore[method-assign]
        lambda self, manifest: die() if manifest["stage"] == stage else publish(self, manifest)
    )


def before_the_pointer(stage: str) -> None:
    """The artifact exists, but its cell does not point at it yet, and Dagster does not know of it."""
    assign = ArtifactStore.assign
    ArtifactStore.assign = (  # type: ignore[method-assign]
        lambda self, e, k, name, artifact, **named: (
            die() if name == stage else assign(self, e, k, name, artifact, **named)
        )
    )


MOMENTS = {
    "Ctrl-C while generating": interrupted_while_generating,
    "generating": while_generating,
    "training": while_training,
    "before the datapool's manifest": lambda: before_the_manifest("datapool"),
    "before the checkpoint's pointer": lambda: before_the_pointer("checkpoint"),
}

if __name__ == "__main__":
    moment = sys.argv.pop(1)
    MOMENTS[moment]()
    main()
