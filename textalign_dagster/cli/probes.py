"""Finds out what is installed, also by running Python snippets in a separate process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from textalign_dagster.settings import SettingsError

PROBE_SECONDS = 120.0
VLLM_PROBE = """
import json, vllm
from vllm.platforms import current_platform
print(json.dumps({"version": vllm.__version__, "device": current_platform.device_type}))
"""


def check_installed(field: str, package: str, extra: str) -> None:
    """Raises `SettingsError` if a package that a field of the experiment needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SettingsError(f"{field}: needs the {package} package: pip install -e '.[{extra}]'")


def probe(code: str) -> dict[str, Any]:
    """The JSON object that a snippet prints in a separate process; ``{"error": …}`` if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            # Otherwise the environment of a training run: a package that fails there fails here too.
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS:g} s"}
    if done.returncode == 0:
        for line in reversed(done.stdout.splitlines()):  # packages print, also when the process ends
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
    message = (done.stderr.strip().splitlines() or ["no output"])[-1]
    if done.returncode < 0:
        message = f"ended by signal {-done.returncode} ({message})"
    return {"error": message}
