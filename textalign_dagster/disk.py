"""Flushes files and folders to disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot fsync folders
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)
