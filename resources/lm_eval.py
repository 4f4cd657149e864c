"""lm-evaluation-harness in a separate process: a model's folder in, a table of its metrics out."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from resources.compute.processes import Supervised
from textalign_dagster.settings.lm_eval import LMEval
from textalign_dagster.tables import LM_EVAL

TAIL = 2000  # characters of the log shown in an error


class LMEvalError(RuntimeError):
    """The harness failed; the message includes the end of its output."""


def identity(settings: LMEval) -> dict[str, Any]:
    """Everything the metrics depend on, including the harness's version and a hash of custom task files."""
    given = settings.model_dump(mode="json", exclude={"path", "batch_size"})
    return {**given, "version": version("lm_eval"), "files": settings.files_hash}


def run(settings: LMEval, model: Path, dtype: str, *, trust_remote_code: bool, seed: int) -> pl.DataFrame:
    """Evaluates a model; returns its metrics as a table of LM_EVAL.

    Raises:
        LMEvalError: a task is unknown, its data are not available, or the model cannot be run.
    """
    arguments = {"pretrained": str(model), "dtype": dtype, **settings.model_args}
    with tempfile.TemporaryDirectory(prefix="lm_eval-") as scratch:
        out, log = Path(scratch) / "out", Path(scratch) / "log"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", settings.backend]
        command += ["--model_args", json.dumps(arguments), "--tasks", ",".join(settings.tasks)]
        command += ["--batch_size", str(settings.batch_size), "--output_path", str(out), "--seed", str(seed)]
        if settings.path is not None:
            command += ["--include_path", settings.path]
        if settings.num_fewshot is not None:
            command += ["--num_fewshot", str(settings.num_fewshot)]
        if settings.limit is not None:
            command += ["--limit", str(settings.limit)]
        command += ["--apply_chat_template"] if settings.chat_template else []
        command += ["--trust_remote_code"] if trust_remote_code else []
        with log.open("wb") as stream:
            child = Supervised(command, stdout=stream, stderr=subprocess.STDOUT)
            try:
                code = child.wait()
            finally:  # also when the run is cancelled
                child.stop()
        found = sorted(out.rglob("results_*.json"))
        if code != 0 or not found:
            output = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
            raise LMEvalError(
                f"evaluation.lm_eval: the harness failed or wrote no results (exit code {code}); "
                f"its last output:\n{output}"
            )
        return read_results(json.loads(found[-1].read_text(encoding="utf-8")))


def read_results(results: dict[str, Any]) -> pl.DataFrame:
    """The harness's results as a table of LM_EVAL: tasks and groups, one row per metric."""
    rows = []
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        for name, value in numbers.items():
            metric, separator, how = name.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{how}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if how == "none" else f"{metric} ({how})",
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "n": results.get("n-samples", {}).get(task, {}).get("effective"),
                    "fewshot": results.get("n-shot", {}).get(task),
                    "version": str(results.get("versions", {}).get(task)),
                }
            )
    return pl.DataFrame(rows, LM_EVAL)
