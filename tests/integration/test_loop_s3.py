"""The whole loop with its artifacts on S3 (moto): run, shown, queried in SQL, and reused from another machine."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.integration.conftest import new_place, s3_environment
from tests.toy import textalign

pytest.importorskip("obstore", reason="object stores need the extra s3")


def test_the_loop_on_s3(s3_endpoint: str, tmp_path: Path) -> None:
    urlopen(Request(f"{s3_endpoint}/loop", method="PUT")).close()
    place = new_place(tmp_path / "here")
    shared = {"TEXTALIGN_STORE": "s3://loop/team", **s3_environment(s3_endpoint)}
    here = {k: v for k, v in place.env.items() if not k.startswith("AWS_")} | shared
    here["TEXTALIGN_CACHE"] = str(tmp_path / "cache")
    textalign("run", "toy", "--no-control", "--iterations", "2", env=here)
    assert not (place.home / "store").exists()
    query = "select count(*) as n from samples where iteration = 2 and feedback_status = 'ok'"
    assert "12" in textalign("sql", query, env=here).stdout

    # Another machine: the same store and experiment files, nothing else.
    there = here | {"TEXTALIGN_HOME": str(tmp_path / "there"), "TEXTALIGN_CACHE": str(tmp_path / "cache2")}
    assert "iteration 0 (base policy)" in textalign("show", "toy", env=there).stdout
    again = textalign("run", "toy", "--no-control", "--iterations", "2", env=there).stdout
    assert again.count(" reused ") == 12, again
    secret = s3_environment(s3_endpoint)["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret in p.read_bytes()]
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
