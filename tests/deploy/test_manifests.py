"""Every object is one that Kubernetes takes, and the chart says what the overlays say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.rendering import (
    CHART,
    FOLDERS,
    PLATFORMS,
    Manifest,
    charted,
    everything,
    kustomized,
    named,
    pods,
    rendered,
)

pytestmark = pytest.mark.deploy

OLDEST, NEWEST = "1.28", "1.37"
"""Versions of Kubernetes; the chart names the oldest too."""

CUSTOM = yaml.safe_load((Path(__file__).parent / "crds.yaml").read_text())
ORIGINS = (*FOLDERS, *(f"helm {values}" for values in (*PLATFORMS, "scaled")))


def check(manifest: Manifest, version: str) -> None:
    """Raises a validation error for anything that is not known, or not of its type."""
    if manifest["kind"] not in CUSTOM:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, CUSTOM[manifest["kind"]])
    for template in pods(manifest):
        holder = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(holder, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("origin", ORIGINS)
def test_objects_are_what_kubernetes_takes(origin: str, version: str) -> None:
    manifests = everything()[origin]
    assert manifests
    for manifest in manifests:
        check(manifest, version)


def test_the_oldest_version_is_the_chart_s() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["kubeVersion"] == f">={OLDEST}.0-0"


def test_a_field_with_a_typing_error_is_found() -> None:
    """The validation is as strict as the tests above believe."""
    wrong = copy.deepcopy(named(charted("cpu"), "Deployment", "pshare-frontend"))
    pods(wrong)[0]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        check(wrong, NEWEST)
    wrong = copy.deepcopy(named(kustomized("kustomize/monitoring"), "ServiceMonitor", "pshare"))
    wrong["spec"]["endpoint"] = []
    with pytest.raises(jsonschema.ValidationError, match="endpoint"):
        check(wrong, NEWEST)
    wrong = copy.deepcopy(named(kustomized("ray"), "RayCluster", "pshare"))
    wrong["spec"]["workerGroups"] = []
    with pytest.raises(jsonschema.ValidationError, match="workerGroups"):
        check(wrong, NEWEST)
    wrong = copy.deepcopy(named(kustomized("ray"), "RayCluster", "pshare"))
    pods(wrong)[1]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        check(wrong, NEWEST)


@pytest.mark.parametrize("origin", ORIGINS)
def test_names_are_unique(origin: str) -> None:
    names = [(m["kind"], m["metadata"]["name"]) for m in everything()[origin]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Deployment", "pshare-frontend"),
        ("StatefulSet", "pshare-prefill"),
        ("StatefulSet", "pshare-decode"),
    ],
)
def test_the_chart_runs_the_pods_of_the_overlay(platform: str, kind: str, name: str) -> None:
    ours = named(kustomized(f"kustomize/overlays/{platform}"), kind, name)["spec"]
    theirs = named(charted(platform), kind, name)["spec"]
    assert comparable(theirs["template"]) == comparable(ours["template"])
    if kind == "StatefulSet":
        assert theirs["replicas"] == ours["replicas"]
        assert theirs["serviceName"] == ours["serviceName"]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    "kind", ["NetworkPolicy", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
)
def test_the_chart_has_the_policies_of_the_overlay(platform: str, kind: str) -> None:
    def specs(manifests: tuple[Manifest, ...]) -> dict[str, Any]:
        return {
            m["metadata"]["name"]: without_instance(m["spec"])
            for m in manifests
            if m["kind"] == kind
        }

    assert specs(charted(platform)) == specs(kustomized(f"kustomize/overlays/{platform}"))


def test_a_release_of_another_name_refers_to_its_own_objects() -> None:
    manifests = charted("cpu", release="other", monitored=True)
    text = yaml.safe_dump([m for m in manifests if m["kind"] != "ConfigMap"])
    # The secrets and the claim are the user's, whatever the release is called.
    for kept in ("pshare-jax", "pshare-api-keys", "pshare-control", "pshare-checkpoints"):
        text = text.replace(kept, "")
    assert "pshare-" not in text
    (container,) = pods(named(manifests, "Deployment", "other-frontend"))[0]["spec"]["containers"]
    assert "--workers=dns:other-workers:7000" in container["args"]


def test_what_can_be_turned_off_is_off() -> None:
    off: Manifest = {"enabled": False}
    manifests = rendered(
        {"autoscaling": off, "networkPolicy": off, "podDisruptionBudget": off, "monitoring": off}
    )
    assert sorted({m["kind"] for m in manifests}) == [
        *("ConfigMap", "Deployment", "Service", "ServiceAccount", "StatefulSet"),
    ]
    assert named(manifests, "Deployment", "pshare-frontend")["spec"]["replicas"] == 2


@pytest.mark.parametrize(
    "values",
    [
        {"prefil": {"replicas": 2}},
        {"decode": {"replicas": 0}},
        {"image": {"tag": ""}},
        {"config": {"server": {"drain_seconds": "long"}}},
    ],
)
def test_values_with_typing_errors_are_refused(values: Manifest) -> None:
    with pytest.raises(helm_python.HelmError):
        rendered(values)


def test_helm_finds_no_fault_with_the_chart() -> None:
    found = helm_python.lint(CHART)
    assert found["errors"] == []
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


def comparable(template: Manifest) -> Manifest:
    """A pod template without what the two ways of rendering call by different names."""
    spec = without_instance(copy.deepcopy(template["spec"]))
    (container,) = spec["containers"]
    container.pop("imagePullPolicy", None)
    container["env"] = sorted(entry["name"] for entry in container.get("env", []))
    container["volumeMounts"].sort(key=lambda mount: mount["name"])
    spec["volumes"].sort(key=lambda volume: volume["name"])
    for volume in spec["volumes"]:
        if "configMap" in volume:
            # Kustomize appends a digest of the contents.
            volume["configMap"]["name"] = "-".join(volume["configMap"]["name"].split("-")[:2])
    return spec


def without_instance(value: Any) -> Any:
    """Without the label that tells releases of a chart apart."""
    if isinstance(value, dict):
        return {
            key: without_instance(item)
            for key, item in value.items()
            if key != "app.kubernetes.io/instance"
        }
    return [without_instance(item) for item in value] if isinstance(value, list) else value
