"""The folder with a training's snapshots: their names, and which is the newest. Does not import torch.

::

    {training}-{step:08d}-{life:08x}/    what `training.state.snapshots` writes

``training`` is a hash of everything that determines the training, so that a snapshot is never mistaken for
another training's; ``life`` identifies the process, or group of processes, that wrote it. A snapshot is
written under a name that starts with a dot, and renamed when it is complete.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"(?P<training>[0-9a-f]{24})-(?P<step>\d{8,})-(?P<life>[0-9a-f]{8})")


@dataclass(frozen=True, order=True)
class SnapshotName:
    """A snapshot's name: the steps done, the processes that wrote it, and the training."""

    step: int
    life: int
    training: str

    def __str__(self) -> str:
        return f"{self.training}-{self.step:08d}-{self.life:08x}"


def names(folder: Path, training: str | None = None) -> list[SnapshotName]:
    """The complete snapshots in a folder, of one training or of all, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and training in (None, match["training"]):
            found.append(SnapshotName(int(match["step"]), int(match["life"], 16), match["training"]))
    return sorted(found)


def publish(folder: Path, draft: Path, name: SnapshotName) -> None:
    """Gives a complete snapshot its name; removes its training's older ones, and incomplete ones of other processes."""
    draft.replace(folder / str(name))
    older = [folder / str(old) for old in names(folder, name.training) if old.step < name.step]
    for path in (*older, *folder.glob(f".{name.training}-*")):
        shutil.rmtree(path, ignore_errors=True)


def kept(folder: Path) -> str:
    """A note on an interrupted training's snapshot; empty if there is none."""
    found = names(folder)
    return f"; step {found[-1].step} is kept, and the next run resumes from there" if found else ""
