"""The two shell scripts of a training job on Slurm: one for the job, one for each of its nodes.

A job that Slurm restarts writes its results into a new folder for that life, apart from what an earlier
life wrote, or still writes from a node that came back. (It resumes from the newest snapshot, which is
complete whichever life wrote it, and belongs to the same training.) Slurm's own restart count does not
distinguish lives: a controller that crashes may start a job twice without counting.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from resources.launchers.launcher import HEAD, NODE, PORT

NOT_SHARED = 97  # exit code: a node does not see the job's folder
NO_PYTHON = 96  # exit code: a node does not see the interpreter

LIFE = "TEXTALIGN_LIFE"

JOB = """#!/bin/bash
# Written by textalign: {title}. Runs on the first node of the job.
# The warning before the time limit is for the trainer; it would end this shell.
trap '' USR1
cd {folder} || exit {not_shared}
printf '%s' "$SLURM_JOB_ID" > job_id
life=0
until mkdir "$life" 2> /dev/null; do
  [ -d "$life" ] || exit {not_shared}
  life=$((life + 1))
done
cd "$life" && export {life}=$life || exit {not_shared}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The address at which Slurm itself reaches that node.
{head}=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\) .*/\\1/p')
export {head}=${{{head}:-$first}}
export {port}=$((20000 + SLURM_JOB_ID % 20000))
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 {options}\\
  --export=ALL --kill-on-bad-exit=1 /bin/bash {folder}/node.sh < /dev/null
code=$?
# Needed once the scheduler has forgotten this job.
printf '%s %s' "$code" "$SECONDS" > .ended && mv .ended ended
exit "$code"
"""

ON_NODE = """#!/bin/bash
# Written by textalign: {title}. Runs once on each node, in the folder of this life.
trap '' USR1
# The node that fails first decides how the job ends, but Slurm reports how the last one was terminated.
trap : TERM
cd {folder}/"${life}" || exit {not_shared}
set -e
{setup}
set +e
if ! command -v {python} > /dev/null; then
  echo "{python_plain} is not on $(hostname)" >&2
  exit {no_python}
fi
export {node}=$SLURM_NODEID
{exports}
# The trainer takes a last snapshot; accelerate, which does not pass the signal on, would end at once, and the trainer with it.
(trap '' TERM; exec {command})
code=$?
printf '%s %s' "$code" "$SLURMD_NODENAME" > ".node_$SLURM_NODEID" && mv ".node_$SLURM_NODEID" "node_$SLURM_NODEID"
exit "$code"
"""


def job_script(title: str, folder: Path, *, nodes: int, cpus_per_task: int | None) -> str:
    """The batch script."""
    # srun does not inherit it from sbatch.
    options = f"--cpus-per-task={cpus_per_task} " if cpus_per_task is not None else ""
    return JOB.format(
        title=_one_line(title),
        folder=shlex.quote(str(folder)),
        nodes=nodes,
        options=options,
        life=LIFE,
        head=HEAD[1:],
        port=PORT[1:],
        not_shared=NOT_SHARED,
    )


def node_script(
    title: str, folder: Path, command: Sequence[str], env: Mapping[str, str], setup: Sequence[str]
) -> str:
    """What ``srun`` starts on each node: the site's setup lines, the environment, and the command."""
    return ON_NODE.format(
        title=_one_line(title),
        folder=shlex.quote(str(folder)),
        setup="\n".join(setup) or ":",
        python=shlex.quote(command[0]),
        python_plain=command[0].replace('"', "").replace("$", "").replace("`", ""),
        life=LIFE,
        node=NODE[1:],
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(env.items())),
        command=" ".join(
            f'"{word}"' if word in (NODE, HEAD, PORT) else shlex.quote(word) for word in command
        ),
        not_shared=NOT_SHARED,
        no_python=NO_PYTHON,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
