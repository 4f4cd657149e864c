"""A private Slurm cluster on this machine: munge, one controller, two nodes; no systemd, no fixed port.

Everything is in one folder, which is removed when the block ends. Two nodes on one machine give
a real scheduler and real job steps, but no network, no GPU and no shared disk.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scancel", "scontrol", "srun")
NODES = ("n1", "n2")
PATIENCE = 30.0  # seconds
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """
ClusterName=textalign
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
FirstJobId={first}
ReturnToService=2
SlurmdTimeout=60
KillWait=2
MinJobAge=300
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def impossible() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [command for command in COMMANDS if shutil.which(command, path=PATH) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "only root can start a private Slurm cluster"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running cluster; ``env`` is the environment of its commands."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def run(self, *command: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(
            command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self) -> list[str]:
        """The ids of the jobs that are queued or running."""
        return self.run("squeue", "--noheader", "--format=%i").split()

    def is_idle(self) -> bool:
        """Whether all nodes are up and free."""
        try:
            return self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES)
        except AssertionError:
            return False  # no controller yet


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two idle nodes.

    Raises:
        RuntimeError: a daemon did not start; with the end of its log.
    """
    # A short path outside pytest's folders: a socket's path is limited to a hundred characters.
    folder = Path("/tmp") / f"textalign-slurm-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o755)
    slurm = Cluster(folder)
    (folder / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    # Trainings derive ports from job ids: those of two clusters on one machine must differ.
    first = 1 + secrets.randbelow(18_000)
    conf = CONF.format(host=host, ports=_free_ports(3), folder=folder, first=first)
    (folder / "slurm.conf").write_text(conf)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    munge = {f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")}
    try:
        with ExitStack() as daemons:
            start = daemons.enter_context
            start(_daemon(slurm, "munged", "--foreground", f"--socket={folder}/munge.socket", *munge))
            _until(lambda: (folder / "munge.socket").exists(), folder / "munged.out")
            start(_daemon(slurm, "slurmctld", "-D", "-f", f"{folder}/slurm.conf"))
            for node in NODES:
                start(_daemon(slurm, "slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf", name=node))
            _until(slurm.is_idle, folder / "slurmctld.log")
            try:
                yield slurm
            finally:
                _cancel_jobs(slurm)
    finally:
        _kill_the_rest(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _daemon(slurm: Cluster, *command: str, name: str | None = None) -> Iterator[None]:
    with (slurm.folder / f"{name or command[0]}.out").open("wb") as out:
        program = shutil.which(command[0], path=PATH) or command[0]
        process = subprocess.Popen(
            [program, *command[1:]],
            env={**os.environ, **slurm.env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            end_of_log = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
            raise RuntimeError(f"Slurm did not start: {end_of_log}")
        time.sleep(0.05)


def _cancel_jobs(slurm: Cluster) -> None:
    """Cancels all jobs: a node's daemon would leave their processes behind."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        slurm.run("scancel", "--quiet", "--user=root")
        deadline = time.monotonic() + PATIENCE
        while slurm.jobs() and time.monotonic() < deadline:
            time.sleep(0.1)


def _kill_the_rest(folder: Path) -> None:
    """Kills all processes that still have this cluster's configuration in their environment."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def _free_ports(count: int) -> Sequence[int]:
    with ExitStack() as sockets:
        taken = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in taken]
