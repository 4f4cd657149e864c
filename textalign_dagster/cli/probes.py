"""Snippets of Python in a process of their own: what an installed package says of itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

PROBE_SECONDS = 120.0
VLLM_PROBE = """
import json, vllm
from vllm.platforms import current_platform
print(json.dumps({"version": vllm.__version__, "device": current_platform.device_type}))
"""


def probe(code: str) -> dict[str, Any]:
    """What a snippet prints as JSON in a process of its own; ``{"error": …}`` where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            # Otherwise the environment of a training: what a package refuses there, it refuses here.
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
    said = (done.stderr.strip().splitlines() or ["no output"])[-1]
    if done.returncode < 0:
        said = f"ended by signal {-done.returncode} ({said})"
    return {"error": said}
