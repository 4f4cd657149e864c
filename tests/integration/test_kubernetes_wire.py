"""Wire tests: what a training sends to Kubernetes and how it handles the responses. The server is a fake and
its pods are local processes, so none of this was tested on Kubernetes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

pytest.importorskip("dagster_k8s", reason="needs the extra `k8s`")

from resources.compute.pods import check_kubernetes
from resources.launchers.kubernetes import KubernetesLauncher
from resources.launchers.launcher import Launched, Work
from tests.integration.fake_kubernetes import Cluster, fake_kubernetes
from tests.toy import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.settings.kubernetes import Kubernetes
from training.settings import Training

PATIENCE = 60.0  # seconds

TRAINER = """
import json, os, pathlib, signal, sys, time
from dagster_pipes import open_dagster_pipes

what, gate, out = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
print("the trainer's first line", flush=True)
with open_dagster_pipes() as context:
    assert os.environ["FROM_TEST"] == "it's" and context.extras == {"cell": "toy|001"}
    context.report_custom_message({"progress": {"done": 1, "total": 2}})
    if what == "bad input":
        raise type("JobError", (Exception,), {})("rows: no such file")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    (gate / "started").touch()
    deadline = time.monotonic() + 60
    while not (gate / "go").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    context.report_custom_message({"progress": {"done": 2, "total": 2}})
    if what != "silent":
        (out / "done.json").write_text(json.dumps({"steps": 2, "seconds": {"load": 1.0, "train": 0.5}}))
"""

DRIVER = """
import sys
from pathlib import Path
import dagster as dg
from tests.integration.test_kubernetes_wire import train

folder = Path(sys.argv[1])
train(folder, instance=dg.DagsterInstance.local_temp(str(folder / "instance")))
"""


def settings(folder: Path) -> Kubernetes:
    return Kubernetes(
        image="textalign:1",
        python=sys.executable,
        namespace="lab",
        volume_claim="data",
        mount_path=str(folder),
        gpus=2,
        cpu="8",
        memory="64Gi",
        node_selector={"gpu": "a100"},
        tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        service_account="trainer",
        env_from_secrets=["huggingface"],
    )


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with fake_kubernetes(tmp_path) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        # The client decides where to look when it is imported.
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(fake.kubeconfig)
        )
        yield fake


def train(
    folder: Path,
    what: str = "train",
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
    instance: dg.DagsterInstance | None = None,
    settling: float = 10.0,
) -> Launched:
    """Trains inside an asset's step; raises what the step raises."""
    (folder / "trainer.py").write_text(TRAINER)
    launched: list[Launched] = []

    def place(name: str) -> Path:
        (folder / "draft" / name).mkdir(parents=True, exist_ok=True)
        return folder / "draft" / name

    def write(place: Callable[[str], Path]) -> list[str]:
        (place("model") / "done.json").unlink(missing_ok=True)
        return ["python", str(folder / "trainer.py"), what, str(folder), str(place("model"))]

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        launcher = KubernetesLauncher(settings(folder), "key", folder, every=0.1, settling=settling)
        launched.append(
            launcher.train(
                context,
                Work(
                    folder=place,
                    unfinished=folder / "unfinished",
                    write=write,
                    extras={"cell": "toy|001"},
                    env={"FROM_TEST": "it's"},
                    on_progress=on_progress,
                    log=folder / "logs" / "train.log",
                ),
            )
        )
        return dg.MaterializeResult()

    dg.materialize([checkpoint], instance=instance)
    return launched[0]


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


def training_process(folder: Path) -> subprocess.Popen[bytes]:
    """A Dagster process whose training has started."""
    (folder / "instance").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until((folder / "started").exists, "a training")
    return process


def test_training_in_a_pod(tmp_path: Path, cluster: Cluster) -> None:
    seen: list[int] = []

    def on_progress(values: dict[str, Any]) -> None:
        seen.append(values["done"])
        (tmp_path / "go").touch()  # the trainer waits for this: progress arrives while it runs

    launched = train(tmp_path, on_progress=on_progress)
    assert launched == Launched(1.5, {"steps": 2, "seconds": {"load": 1.0, "train": 0.5}}) and seen == [1, 2]
    assert "the trainer's first line" in (tmp_path / "logs" / "train.log").read_text()
    assert not (tmp_path / "logs" / "train.messages").exists()
    assert cluster.pods == {}  # deleted

    (body,) = cluster.created
    container = body["spec"]["containers"][0]
    assert container["resources"] == {
        "limits": {"nvidia.com/gpu": "2", "memory": "64Gi"},
        "requests": {"cpu": "8", "memory": "64Gi"},
    }
    assert {"name": "data", "mountPath": str(tmp_path)} in container["volumeMounts"]
    assert container["envFrom"] == [{"secretRef": {"name": "huggingface"}}]
    assert body["spec"]["nodeSelector"] == {"gpu": "a100"}
    assert body["spec"]["tolerations"][0]["key"] == "gpu" and body["spec"]["restartPolicy"] == "Never"
    validator = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", **body}
    validator.validate(pod, validator.latest_version(), strict=True)
    pod["spec"]["containers"][0]["resourcez"] = {}
    with pytest.raises(validator.ValidationError):  # unknown fields are detected
        validator.validate(pod, validator.latest_version(), strict=True)


@pytest.mark.parametrize(
    "what, words",
    {
        "bad input": r"JobError: rows: no such file \(pod dagster-\S+: Failed, Error, exit code 1\)",
        "killed": r"ran out of memory \(Failed, OOMKilled, exit code 137\): raise training.k8s.memory",
        "silent": r"ended with exit code 0, but the trainer did not report that it is done",
    }.items(),
)
def test_how_a_training_ended_is_reported(tmp_path: Path, cluster: Cluster, what: str, words: str) -> None:
    (tmp_path / "go").touch()
    with pytest.raises(dg.Failure, match=words) as failure:
        train(tmp_path, what, settling=1.0)
    assert failure.value.allow_retries == (what != "bad input")
    assert "first line" in str(failure.value.metadata["end of log"].value)
    assert cluster.pods == {}


def test_cluster_that_stops_answering_does_not_hide_a_success(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "go").touch()
    delete, calls = KubernetesLauncher._delete, list[int]()

    def fails_afterwards(self: KubernetesLauncher, api: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("no answer")
        delete(self, api)

    monkeypatch.setattr(KubernetesLauncher, "_delete", fails_afterwards)
    assert train(tmp_path).done is not None and len(cluster.pods) == 1
    assert train(tmp_path).done is not None and cluster.pods == {}  # the next run deletes it


def test_a_cancelled_run_deletes_its_pod(tmp_path: Path, cluster: Cluster) -> None:
    process = training_process(tmp_path)
    assert len(cluster.pods) == 1
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)
    assert cluster.pods == {} and any(call.startswith("DELETE") for call in cluster.calls)


def test_next_run_deletes_the_pod_of_a_killed_run(tmp_path: Path, cluster: Cluster) -> None:
    process = training_process(tmp_path)
    process.kill()
    process.wait()
    (left,) = cluster.pods
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:
        # As long as Dagster considers the run alive, its pod is not touched.
        with pytest.raises(dg.Failure, match=rf"is already training this in pod {left}; wait for it"):
            train(tmp_path, instance=instance)
        assert list(cluster.pods) == [left]
        instance.report_run_failed(instance.get_runs()[-1])
        (tmp_path / "go").touch()
        assert train(tmp_path, instance=instance).done is not None
    assert cluster.pods == {} and len(cluster.created) == 2


def test_impossible_settings_are_rejected_before_start(tmp_path: Path, cluster: Cluster) -> None:
    assert check_kubernetes(settings(tmp_path)) == "kubernetes: namespace lab, image textalign:1"
    elsewhere = settings(tmp_path).model_copy(update={"mount_path": "/data"})
    with pytest.raises(SettingsError, match=r"mount_path: .* is not below /data: the pod could not see it"):
        KubernetesLauncher(elsewhere, "key", tmp_path).train(
            None,  # type: ignore[arg-type]
            Work(
                folder=lambda name: tmp_path / name,
                unfinished=tmp_path / "unfinished",
                write=lambda place: [],
                extras={},
                env={},
                on_progress=lambda _: None,
                log=tmp_path / "log",
            ),
        )
    with socket.socket() as silent:  # bound, and not listening
        silent.bind(("127.0.0.1", 0))
        config = re.sub(
            r"127.0.0.1:\d+", f"127.0.0.1:{silent.getsockname()[1]}", cluster.kubeconfig.read_text()
        )
    cluster.kubeconfig.write_text(config)
    with pytest.raises(SettingsError, match="does not respond"):
        check_kubernetes(settings(tmp_path))
    cluster.kubeconfig.unlink()
    with pytest.raises(SettingsError, match=r"no Kubernetes cluster is configured .* set KUBECONFIG"):
        check_kubernetes(settings(tmp_path))


def test_settings() -> None:
    def refusal(**k8s: Any) -> str:
        with pytest.raises(SettingsError) as error:
            validate(Training, {"launcher": "k8s", "k8s": k8s}, "here")
        return str(error.value)

    assert "k8s.image: missing" in refusal(volume_claim="data")
    assert "k8s.volume_claim: missing" in refusal(image="x")
    assert "set it to 4, one per GPU" in refusal(image="x", volume_claim="data", gpus=4)
    assert "give an absolute one" in refusal(image="x", volume_claim="data", mount_path="data")
    assert json.dumps(Training().k8s.model_dump())


def manifests() -> list[dict[str, Any]]:
    text = (PROJECT / "deploy/kubernetes/textalign.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize("manifest", manifests(), ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
def test_manifests_are_valid(manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(manifest, validator.latest_version(), strict=True)


def test_manifests_agree_with_each_other() -> None:
    by_kind: dict[str, dict[str, Any]] = {}
    for manifest in manifests():
        by_kind.setdefault(manifest["kind"], {})[manifest["metadata"]["name"]] = manifest
    config = by_kind["ConfigMap"]["textalign"]["data"]
    instance = (PROJECT / "deploy/compose/dagster.yaml").read_text(encoding="utf-8")  # the image's
    required = set(re.findall(r"env: (\w+)", instance))
    assert required - config.keys() == {"TEXTALIGN_POSTGRES_PASSWORD"}  # in the secret
    workspace = yaml.safe_load((PROJECT / "deploy/compose/workspace.yaml").read_text(encoding="utf-8"))
    server = workspace["load_from"][0]["grpc_server"]
    assert by_kind["Service"][server["host"]]["spec"]["ports"] == [{"port": server["port"]}]
    assert config["TEXTALIGN_POSTGRES_HOST"] in by_kind["Service"]
    for name, deployment in by_kind["Deployment"].items():
        pod = deployment["spec"]["template"]["spec"]
        claims = {
            v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        }
        assert claims <= by_kind["PersistentVolumeClaim"].keys()
        (container,) = pod["containers"]
        if name != "postgres":
            assert {"name": "data", "mountPath": config["TEXTALIGN_HOME"]} in container["volumeMounts"]
    experiment = Library((PROJECT / "deploy/kubernetes", PROJECT / "experiments")).load("my_cluster")
    assert experiment.sampling.launcher == experiment.training.launcher == "k8s"
    for settings in (experiment.training.k8s, experiment.sampling.k8s):
        assert settings.volume_claim in by_kind["PersistentVolumeClaim"]
        assert settings.mount_path == config["TEXTALIGN_HOME"] and config["HF_HOME"].startswith("/data/")
    rules = {rule["resources"][0]: set(rule["verbs"]) for rule in by_kind["Role"]["textalign"]["rules"]}
    assert rules["pods"] >= {"create", "get", "list", "delete"} and rules["pods/attach"] == {"get", "create"}
