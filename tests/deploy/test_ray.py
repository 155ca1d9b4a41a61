"""The RayCluster says what the launcher, and the processes that it has Ray place, need."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from pshare_jax.cli import COMMANDS
from pshare_jax.config import ServeConfig
from pshare_jax.serve import app, ray_drain
from pshare_jax.serve.lifecycle import SHUTDOWN_SECONDS
from pshare_jax.serve.scaling import check_autoscale
from tests.deploy import contract
from tests.deploy.rendering import DEPLOY, Manifest, kustomized, named
from tests.deploy.test_agreement import config_of, flags

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
SIDES = ("frontend", "prefill", "decode")


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return config_of("ray", tmp_path)


def spec() -> Manifest:
    return named(kustomized("ray"), "RayCluster", "pshare")["spec"]


def groups() -> dict[str, Manifest]:
    return {group["groupName"]: group for group in spec()["workerGroupSpecs"]}


def container(group: Manifest, name: str) -> Manifest:
    containers = group["template"]["spec"]["containers"]
    (found,) = (one for one in containers if one["name"] == name)
    return found


def test_the_launcher_s_flags_exist_and_name_what_is_there(config: ServeConfig) -> None:
    launcher = container(spec()["headGroupSpec"], "launcher")
    assert launcher["args"][0] in COMMANDS
    given = flags(launcher)
    assert set(given) <= contract.SERVE
    assert given["--launcher"] == "ray"
    # All processes get these flags, wherever they are placed.
    for group in (spec()["headGroupSpec"], *groups().values()):
        name = "ray-worker" if "groupName" in group else "launcher"
        mounts = [mount["mountPath"] for mount in container(group, name)["volumeMounts"]]
        wanted = [given["--config"], given["--token-file"], config.base]
        wanted += [m.checkpoint for m in config.models if m.checkpoint != "identity"]
        wanted.append(config.compilation_cache_dir)
        for path in wanted:
            assert any(path.startswith(f"{mount}/") for mount in mounts), path
        assert config.cluster.shm_path in mounts


def test_each_pod_has_room_for_one_process_of_its_kind(config: ServeConfig) -> None:
    assert set(groups()) == set(SIDES)
    head = spec()["headGroupSpec"]["rayStartParams"]
    assert head["num-cpus"] == "0"
    counts = {
        "frontend": config.cluster.frontends,
        "prefill": config.prefill.engines,
        "decode": config.decode.engines,
    }
    for side, group in groups().items():
        # KubeRay wants the JSON in quotes of its own.
        has = json.loads(json.loads(group["rayStartParams"]["resources"]))
        asked = getattr(config.cluster.ray, side)
        assert has == asked.resources == {side: 1}
        assert asked.cpus == 0
        assert group["replicas"] == group["minReplicas"] == counts[side] <= group["maxReplicas"]
    check_autoscale(config)


def test_clients_reach_every_frontend(config: ServeConfig) -> None:
    given = flags(container(spec()["headGroupSpec"], "launcher"))
    assert given["--host"] == "0.0.0.0"
    assert config.cluster.ray.one_port
    frontend = container(groups()["frontend"], "ray-worker")
    assert frontend["ports"] == [{"name": "http", "containerPort": int(given["--port"])}]
    assert frontend["readinessProbe"]["httpGet"]["path"] in app._PUBLIC_PATHS
    mounts = [mount["mountPath"] for mount in frontend["volumeMounts"]]
    assert any(config.server.api_keys_file.startswith(f"{mount}/") for mount in mounts)
    service = named(kustomized("ray"), "Service", "pshare")["spec"]
    assert service["ports"][0]["targetPort"] == "http"
    labels = groups()["frontend"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    for side in ("prefill", "decode"):
        other = groups()[side]["template"]["metadata"]["labels"]
        assert not service["selector"].items() <= other.items()


def test_pods_are_drained_before_they_end(config: ServeConfig) -> None:
    assert config.cluster.ray.keep, "the head may go and come again"
    for group in groups().values():
        pod = group["template"]["spec"]
        (command,) = (
            one["lifecycle"]["preStop"]["exec"]["command"][-1] for one in pod["containers"]
        )
        wait, drain = re.fullmatch(
            rf"sleep (\d+); exec python -m {ray_drain.__name__} (\d+)", command
        ).groups()  # type: ignore[union-attr]
        assert float(drain) >= config.server.drain_seconds + 2 * SHUTDOWN_SECONDS
        assert pod["terminationGracePeriodSeconds"] >= float(wait) + float(drain) + 5


def test_nobody_gives_ray_orders_without_its_token() -> None:
    assert spec()["authOptions"] == {"mode": "token", "secretName": "pshare-ray"}
    env = {one["name"]: one for one in container(spec()["headGroupSpec"], "launcher")["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    text = (ROOT / "docs/deploying.md").read_text()
    assert f"secret generic {secret['name']} " in text
    assert f"{secret['key']}=" in text


def test_versions_agree() -> None:
    version = spec()["rayVersion"]
    assert f"ray=={version}" in (DEPLOY / "ray/raycluster.yaml").read_text()
    assert f"ray=={version}" in (DEPLOY / "Dockerfile").read_text()
    assert f"ray=={version}" in (ROOT / "docs/deploying.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["ray"]
    assert wanted == f"ray>={version.rpartition('.')[0]},<3"
