"""The training benchmarks still run; their results are in docs/benchmarks.md."""

from __future__ import annotations

import os
import re

import pytest

from tests import forked
from tests.toy import PROJECT


@pytest.mark.parametrize(
    ("benchmark", "kinds"),
    [
        (["packing"], ["padded", "packed", "one attention"]),
        (
            ["training", "--only", "grpo"],
            ["here", "TRL, sorted by length", "TRL, one sampling for all steps"],
        ),
        (["training", "--only", "kto"], ["here", "TRL, sorted by length", "TRL, default"]),
    ],
)
def test_benchmark_runs(benchmark: list[str], kinds: list[str]) -> None:
    name, *options = benchmark
    program, arguments = ["-m", f"benchmarks.{name}"], ["--rows", "16", "--repeats", "1", *options]
    done = forked.run(program, arguments, env=os.environ, cwd=PROJECT, text="", timeout=300)
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        assert re.search(rf"^  {kind} +\d+\.\d\d s", done.stdout, re.MULTILINE), done.stdout
