"""The contents of deploy/, as far as they can be tested without the hardware: a real Postgres, real files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import Place
from tests.toy import PROJECT, textalign

DEPLOY = PROJECT / "deploy"
SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def read(path: str) -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture
def postgres() -> Iterator[int]:
    """The port of a private Postgres server with the user and database `textalign`."""
    if not SERVERS:
        pytest.skip("Postgres is not installed (apt-get install postgresql)")
    if os.geteuid() != 0 or shutil.which("runuser") is None:
        pytest.skip("Postgres refuses to run as root, and only root can become another user")
    pytest.importorskip("dagster_postgres", reason="needs the extra `postgres`")
    place = Path(tempfile.mkdtemp(prefix="textalign-postgres-"))  # only root can read pytest's own folders
    data, password = place / "data", place / "password"
    password.write_text("secret")
    for path in (place, password):
        shutil.chown(path, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])

    def run(command: str, *arguments: str) -> None:
        as_postgres = ["runuser", "-u", "postgres", "--", str(SERVERS[-1] / command), *arguments]
        subprocess.run(as_postgres, check=True, capture_output=True, timeout=60, cwd="/")

    run("initdb", "-D", str(data), "-U", "textalign", "--pwfile", str(password), "--auth", "scram-sha-256")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    run("pg_ctl", "-D", str(data), "-o", options, "-l", str(data / "log"), "--wait", "start")
    os.environ["PGPASSWORD"] = "secret"
    try:
        run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "textalign", "textalign")
        yield port
    finally:
        del os.environ["PGPASSWORD"]
        run("pg_ctl", "-D", str(data), "-m", "immediate", "--wait", "stop")
        shutil.rmtree(place)


def test_team_instance_runs_an_iteration(postgres: int, place: Place, tmp_path: Path) -> None:
    settings = read("compose/dagster.yaml")
    settings["storage"]["postgres"]["postgres_db"]["port"] = postgres  # the test's server
    (tmp_path / "instance").mkdir()
    (tmp_path / "instance" / "dagster.yaml").write_text(yaml.safe_dump(settings))
    env = place.env | {
        "DAGSTER_HOME": str(tmp_path / "instance"),
        "TEXTALIGN_POSTGRES_HOST": "127.0.0.1",
        "TEXTALIGN_POSTGRES_USER": "textalign",
        "TEXTALIGN_POSTGRES_PASSWORD": "secret",
        "TEXTALIGN_POSTGRES_DB": "textalign",
        "TEXTALIGN_COMPUTE_LOGS": str(tmp_path / "compute_logs"),
    }
    textalign("run", "toy", "--no-control", "--iterations", "1", env=env)
    again = textalign("run", "toy", "--no-control", "--iterations", "1", env=env)
    assert "toy|001  up to date" in again.stdout  # read from Postgres
    assert not list((place.home).rglob("*.db"))


def test_queue_and_pools_match_the_projects() -> None:
    own = yaml.safe_load((PROJECT / "dagster.yaml").read_text(encoding="utf-8"))["concurrency"]
    team = read("compose/dagster.yaml")["concurrency"]
    assert team["pools"] == own["pools"]
    assert team["runs"]["tag_concurrency_limits"] == own["runs"]["tag_concurrency_limits"]


def test_services_set_the_variables_that_the_instance_reads() -> None:
    services = read("compose/compose.yaml")["services"]
    instance = (DEPLOY / "compose/dagster.yaml").read_text(encoding="utf-8")
    required = {line.split("env: ")[1].split("}")[0] for line in instance.splitlines() if "env: " in line}
    for name in ("code", "webserver", "daemon"):
        assert required <= services[name]["environment"].keys()
        assert services[name]["depends_on"].keys() <= services.keys()
    (location,) = read("compose/workspace.yaml")["load_from"]
    assert location["grpc_server"]["host"] in services
    assert f"--port {location['grpc_server']['port']} " in services["code"]["command"]
    assert services["webserver"]["ports"] == ["127.0.0.1:3000:3000"]  # the UI has no login
