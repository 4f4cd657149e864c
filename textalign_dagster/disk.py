"""Forcing what was written to the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems have no fsync of folders
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)
