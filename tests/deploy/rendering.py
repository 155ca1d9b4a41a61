"""What deploy/ comes to: Kustomize by kubectl, the chart by Helm's own engine, both offline."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
CHART = DEPLOY / "helm/pshare-jax"
PLATFORMS = ("cpu", "gpu", "tpu")
OTHERS = ("autoscaled", "multihost")
"""Overlays that the chart has no values for."""
FOLDERS = (
    *(f"kustomize/overlays/{overlay}" for overlay in (*PLATFORMS, *OTHERS)),
    *("kustomize/single", "kustomize/storage", "kustomize/monitoring", "ray"),
)
"""Everything that `kubectl apply -k` takes."""

Manifest = dict[str, Any]


def program(name: str) -> str:
    """A program that the extra `deploy` brings, or one of the machine's own."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is missing: pip install -e '.[deploy]'"
    return found


@functools.cache
def kustomized(folder: str) -> tuple[Manifest, ...]:
    """The objects of a folder below deploy/."""
    done = subprocess.run(
        [program("kubectl"), "kustomize", str(DEPLOY / folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@functools.cache
def charted(
    platform: str, release: str = "pshare", monitored: bool = False
) -> tuple[Manifest, ...]:
    """The objects of the chart with a platform's values; `cpu` has the chart's own."""
    values: Manifest = {}
    if platform != "cpu":
        values = yaml.safe_load((CHART / f"values-{platform}.yaml").read_text())
    return rendered(values | {"monitoring": {"enabled": monitored}}, release)


def rendered(values: Manifest, release: str = "pshare") -> tuple[Manifest, ...]:
    """The objects of the chart with `values` over its own.

    Raises:
        helm_python.HelmError: the values are not what the chart's schema allows.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        files = chart.render(values, name=release, namespace="pshare-jax")
    return tuple(
        manifest for text in files.values() for manifest in yaml.safe_load_all(text) if manifest
    )


@functools.cache
def everything() -> dict[str, tuple[Manifest, ...]]:
    """All objects, by where they come from."""
    found = {folder: kustomized(folder) for folder in FOLDERS}
    found |= {f"helm {p}": charted(p, monitored=True) for p in PLATFORMS}
    return found | {"helm scaled": rendered({"scaler": {"enabled": True}})}


def named(manifests: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    """The object of that kind and name."""
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def pods(manifest: Manifest) -> list[Manifest]:
    """The pod templates of an object, each with `metadata` and `spec`."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "RayCluster":
        return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    if manifest["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"]["workerTemplate"]]
    return [spec["template"]] if "template" in spec else []
