"""How the output of Slurm's commands is interpreted, with fake commands; a real Slurm: tests/integration."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from resources.compute import slurm
from resources.launchers.launcher import HEAD, NODE, PORT, Acceleration, accelerate_command
from resources.launchers.slurm import SlurmLauncher
from resources.launchers.slurm_failure import reason_of
from resources.launchers.slurm_job import SlurmJob
from resources.launchers.slurm_script import job_script, node_script
from textalign_dagster import PROJECT
from textalign_dagster.cli.doctor import _slurm
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.settings.clusters import Slurm
from training.acceleration import check_training
from training.settings import Training


def commands(folder: Path, patch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Replace Slurm's commands with these shell scripts."""
    for name, body in bodies.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    real = {name for name in slurm.COMMANDS if name not in bodies}
    which = slurm.shutil.which
    patch.setattr(slurm.shutil, "which", lambda name: None if name in real else which(name))


GONE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize(
    "squeue, scontrol, sacct, expected",
    [
        ("echo 'RUNNING|None'", "exit 9", "exit 9", "RUNNING"),
        ("echo 'PENDING|Priority'", "exit 9", "exit 9", "PENDING (Priority)"),
        (
            "echo 'FAILED|NonZeroExitCode'",
            "echo 'JobId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0 X=1'",
            "exit 9",
            "FAILED (NonZeroExitCode, exit code 3:0)",
        ),
        (GONE, "echo 'JobId=1 JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125'", "exit 9",
         "OUT_OF_MEMORY (OutOfMemory, exit code 0:125)"),
        (GONE, GONE, "echo 'CANCELLED by 1000|0:0'", "CANCELLED"),
        (GONE, GONE, "echo 'Slurm accounting storage is disabled' >&2; exit 1", None),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "exit 1", "exit 1", None),
        ("true", GONE, "true", None),
    ],
)  # fmt: skip
def test_state_is_read_from_queue_then_controller_then_accounting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    squeue: str,
    scontrol: str,
    sacct: str,
    expected: str | None,
) -> None:
    commands(tmp_path, monkeypatch, squeue=squeue, scontrol=scontrol, sacct=sacct)
    state = slurm.state("1")
    assert (None if state is None else str(state)) == expected


def test_sites_without_accounting_have_no_sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, squeue=GONE, scontrol=GONE)
    assert slurm.state("1") is None


def test_an_unreachable_queue_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(slurm.SlurmSilent, match="squeue: slurm_load_jobs error: Unable to contact"):
        slurm.listed("name")


def test_jobs_are_listed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, squeue="echo '7|RUNNING|None|/a b|c'; echo '8|PENDING|Dependency|/d'")
    assert slurm.listed("name") == [
        slurm.Listed("7", "RUNNING", "None", Path("/a b|c")),
        slurm.Listed("8", "PENDING", "Dependency", Path("/d")),
    ]


def test_cluster_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = dict.fromkeys(("sbatch", "squeue", "scancel", "scontrol"), "exit 9")
    commands(tmp_path, monkeypatch, **quiet, sinfo="echo 'gpu|16'; echo 'cpu*|4'")
    assert slurm.partitions() == {"gpu": (16, False), "cpu": (4, True)}
    assert slurm.check_slurm(Slurm()) == "slurm: 1 of 4 nodes of partition cpu"
    assert _slurm().detail == "partitions gpu (16 nodes), cpu (4 nodes)"
    with pytest.raises(SettingsError, match="nodes: 5, but partition cpu has 4"):
        slurm.check_slurm(Slurm(nodes=5))
    commands(tmp_path, monkeypatch, **quiet, sinfo="echo 'gpu|16'")
    with pytest.raises(SettingsError, match="the cluster has no default; one of gpu"):
        slurm.check_slurm(Slurm())
    commands(tmp_path, monkeypatch, **quiet, sinfo="echo 'sinfo: error: no controller' >&2; exit 1")
    with pytest.raises(SettingsError, match=r"does not respond \(sinfo: no controller\); is slurmctld up"):
        slurm.check_slurm(Slurm())
    assert _slurm().state == "missing"
    commands(tmp_path, monkeypatch, sinfo="true")
    with pytest.raises(SettingsError, match="slurm needs sbatch, squeue, scancel, scontrol on the PATH"):
        slurm.check_slurm(Slurm())


def test_jobs_do_not_inherit_secrets() -> None:
    environment = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "NCCL_DEBUG": "INFO",
        "SLURM_CONF": "/etc/x",
        "OPENAI_API_KEY": "sk-1",
        "AWS_SECRET_ACCESS_KEY": "s",
        "SLURM_JOB_ID": "12",
        "RANK": "3",
        "PATHWAY_TOKEN": "t",
    }
    assert set(slurm.inherited(environment)) == {"PATH", "LC_ALL", "NCCL_DEBUG", "SLURM_CONF"}


def shell(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.sh"
    path.write_text(script)
    return subprocess.run(
        ["/bin/bash", str(path)],
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_command_words_reach_the_node_unchanged(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    words = ["/bin/echo", NODE, HEAD, PORT, "$HOME", "it's", 'a "b"', "`id`"]
    script = node_script("a\nb", tmp_path, words, {"SAID": "x'$y"}, ['echo "setup $SLURM_NODEID"'])
    done = shell(
        script,
        tmp_path,
        SLURM_NODEID="1",
        TEXTALIGN_LIFE="0",
        SLURMD_NODENAME="n2",
        TEXTALIGN_HEAD="n1",
        TEXTALIGN_PORT="7",
    )
    assert done.stdout == 'setup 1\n1 n1 7 $HOME it\'s a "b" `id`\n' and done.returncode == 0
    assert (tmp_path / "0" / "node_1").read_text() == "0 n2"


def test_missing_prerequisites_on_a_node_are_reported(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert shell(node_script("t", tmp_path / "none", ["/bin/true"], {}, []), tmp_path).returncode == 97
    done = shell(node_script("t", tmp_path, ["/none/python"], {}, []), tmp_path, TEXTALIGN_LIFE="0")
    assert done.returncode == 96 and "/none/python is not on" in done.stderr
    done = shell(node_script("t", tmp_path, ["/bin/true"], {}, ["false"]), tmp_path, TEXTALIGN_LIFE="0")
    assert done.returncode == 1
    assert shell(job_script("t", tmp_path / "none", nodes=1, cpus_per_task=4), tmp_path).returncode == 97


def a_job(folder: Path, *lives: dict[str, Any]) -> SlurmJob:
    for number, life in enumerate(lives):
        (folder / str(number) / "model").mkdir(parents=True)
        if "done" in life:
            (folder / str(number) / "model" / "done.json").write_text(json.dumps(life["done"]))
        if "ended" in life:
            (folder / str(number) / "ended").write_text(life["ended"])
    return SlurmJob(folder)


def test_a_life_is_finished_when_job_and_trainer_both_report_it(tmp_path: Path) -> None:
    whole = {"done": {"steps": 1}, "ended": "0 12"}

    def finished(name: str, *lives: dict[str, Any]) -> str | None:
        life = a_job(tmp_path / name, *lives).finished()
        return None if life is None else life.name

    assert finished("a", whole) == "0"
    assert finished("b", {}, whole) == "1"
    assert finished("c", whole, {}) == "0"  # the second life does not affect the first
    assert finished("d", *[{}] * 9, whole, whole) == "10"
    assert finished("e", {"ended": "0 12"}) is None
    assert finished("f", {"done": {}, "ended": "1 12"}) is None
    assert finished("g", {"done": {}}) is None
    (tmp_path / "h").mkdir()
    assert SlurmJob(tmp_path / "h").finished() is None


def test_each_start_of_a_job_has_its_own_folder(tmp_path: Path) -> None:
    """Even if Slurm does not count a start, as after a crash of its controller."""
    (tmp_path / "bin").mkdir()
    for command, body in {"scontrol": "echo n1", "srun": 'echo "$TEXTALIGN_LIFE" > "$PWD/life"'}.items():
        (tmp_path / "bin" / command).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / command).chmod(0o755)
    (tmp_path / "job").mkdir()
    script = job_script("t", tmp_path / "job", nodes=1, cpus_per_task=None)
    for _ in range(3):
        done = shell(script, tmp_path, SLURM_JOB_ID="7", PATH=f"{tmp_path}/bin:/usr/bin:/bin")
        assert done.returncode == 0, done.stderr
    job = SlurmJob(tmp_path / "job")
    assert [(life / "life").read_text().strip() for life in job.lives()] == ["0", "1", "2"]
    assert job.job_id == "7" and job.ended() is not None


@pytest.mark.parametrize(
    "state, code, words",
    [
        (
            slurm.State("OUT_OF_MEMORY"),
            None,
            r"ran out of memory on a node: request more \(training.slurm.extra",
        ),
        (
            slurm.State("TIMEOUT", "TimeLimit"),
            None,
            r"reached its time limit: raise training.slurm.time_limit",
        ),
        (slurm.State("NODE_FAIL"), None, "lost a node"),
        (slurm.State("FAILED", exit_code="0:53"), None, "cannot see .* on its nodes .*shared_folder"),
        (slurm.State("FAILED", exit_code="97:0"), 97, "cannot see .* on its nodes"),
        (slurm.State("FAILED", exit_code="96:0"), 96, "found no Python on a node"),
        (slurm.State("CANCELLED"), None, "was cancelled"),
        (slurm.State("COMPLETED"), 0, "did not finish"),
    ],
)
def test_each_failure_has_its_message(
    tmp_path: Path, state: slurm.State, code: int | None, words: str
) -> None:
    message = reason_of(state, tmp_path, code)
    assert re.search(words, message) and "\n" not in message


def test_the_job_name_depends_on_training_and_folder(tmp_path: Path) -> None:
    def name(key: str, folder: Path) -> str:
        return SlurmLauncher(Slurm(), key, "title", folder).name

    assert name("a", tmp_path) == name("a", tmp_path) != name("b", tmp_path) != name("b", tmp_path / "x")


def refusal(**settings: Any) -> str:
    with pytest.raises(SettingsError) as error:
        validate(Training, settings, "here")
    return str(error.value)


def test_settings() -> None:
    assert "cannot be spread evenly over slurm.nodes: 2" in refusal(
        launcher="slurm", processes=3, slurm={"nodes": 2}
    )
    assert "set it to 8, one per GPU" in refusal(
        launcher="slurm", processes=2, slurm={"nodes": 2, "gpus_per_node": 4}
    )
    assert "remove it" in refusal(slurm={"extra": ["--nodes=3"]})
    assert "remove it" in refusal(slurm={"extra": ["-N3"]})
    assert "give an absolute one" in refusal(slurm={"shared_folder": "here"})
    assert "time_limit" in refusal(slurm={"time_limit": "2 hours"})
    for limit in (30, "2:00:00", "1-12", "90", "1-0:30:00"):
        validate(Training, {"slurm": {"time_limit": limit}}, "here")
    many: Training = validate(
        Training,
        {"launcher": "slurm", "processes": 8, "slurm": {"nodes": 2, "extra": ["--mem=8G", "--exclude=n3"]}},
        "here",
    )
    assert many.machines == 2
    assert Training(processes=8).machines == 1


def test_launcher_settings_do_not_change_the_checkpoint() -> None:
    library = Library((PROJECT / "experiments",))
    plain, moved = (
        stage_settings(library.overridden("pep8_alt_lmu", overrides), "checkpoint", 1)
        for overrides in (
            [],
            ["training.launcher=slurm", "training.slurm.partition=gpu", "training.k8s.gpus=2"],
        )
    )
    assert plain == moved


def test_machines_know_their_rank_and_head() -> None:
    command = accelerate_command(Acceleration(processes=8, machines=2))
    pairs = dict(pairwise(command))
    assert (pairs["--num_processes"], pairs["--num_machines"], pairs["--machine_rank"]) == ("8", "2", NODE)
    assert (pairs["--main_process_ip"], pairs["--main_process_port"]) == (HEAD, PORT)
    assert pairs["--rdzv_backend"] == "static" and "--multi_gpu" in command
    spread = accelerate_command(
        Acceleration(processes=8, machines=2, deepspeed=True, config_file=Path("/c.yaml"))
    )
    assert dict(pairwise(spread))["--deepspeed_multinode_launcher"] == "standard"
    assert "--machine_rank" not in accelerate_command(Acceleration(processes=8))


def test_an_accelerate_file_must_match_the_number_of_nodes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\n")
    settings = {"processes": 4, "accelerate": str(path), "slurm": {"nodes": 2}}
    many: Training = validate(Training, {**settings, "launcher": "slurm"}, "here")
    check_training(many, dtype="float32", devices=None)
    here: Training = validate(Training, settings, "here")
    with pytest.raises(SettingsError, match="num_machines is 2, but the launcher's number of machines is 1"):
        check_training(here, dtype="float32", devices=None)
