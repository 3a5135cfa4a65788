"""The files in deploy/: what they start is what there is, and what they ask for exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from typer.main import get_command

from tools import policies
from variator.cli import app
from variator.engines.metrics import PrometheusObserver
from variator.serving.process import GRACE_S

ROOT = Path(__file__).parents[1]


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a file by their kind."""
    found = [one for one in yaml.safe_load_all((ROOT / "deploy" / name).read_text(encoding="utf-8")) if one]
    assert all(one["apiVersion"] and one["metadata"]["name"] for one in found)
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


def option(command: list[str], name: str) -> Any:
    """What a command of ours takes an option for; fails for one that it does not know."""
    verb = get_command(app).commands[command[0]]  # type: ignore[attr-defined]
    return verb.make_context(command[0], command[1:]).params[name]


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict[str, Any]]:
    return documents("kubernetes.yaml")


@pytest.fixture(scope="module")
def pod(kubernetes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return kubernetes["Deployment"]["spec"]["template"]["spec"]


def test_the_deployment_serves_as_many_threads_as_it_measures_and_asks_for(pod: dict[str, Any]) -> None:
    (container,), (build,) = pod["containers"], pod["initContainers"]
    assert container["command"] == ["variator"] and container["args"][0] == "serve"
    script = build["args"][0].split("&&")[1].split()
    assert script[:2] == ["variator", "build"]
    threads = option(container["args"], "threads")
    assert threads == option(script[1:], "threads") == int(container["resources"]["requests"]["cpu"]) > 0
    assert build["resources"] == container["resources"]
    assert option(container["args"], "bundle") == option(script[1:], "bundle")
    assert option(container["args"], "engine") == option(script[1:], "engine") != "auto"
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert str(option(container["args"], "bundle").parent) in mounts
    volumes = {one["name"] for one in pod["volumes"]}
    assert {one["name"] for one in (*container["volumeMounts"], *build["volumeMounts"])} == volumes


def test_probes_ask_for_health_where_the_server_listens(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert option(container["args"], "host") == "0.0.0.0"
    (port,) = container["ports"]
    assert port["containerPort"] == option(container["args"], "port")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    readiness, liveness = container["readinessProbe"], container["livenessProbe"]
    drain_s = option(container["args"], "drain_s")
    assert readiness["failureThreshold"] * readiness["periodSeconds"] < drain_s, "it turns away while it drains"
    assert liveness["failureThreshold"] * liveness["periodSeconds"] > drain_s, "it is not killed while it drains"
    asleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert asleep == "sleep" and pod["terminationGracePeriodSeconds"] >= int(seconds) + drain_s + GRACE_S


def test_everything_points_at_the_same_pods(kubernetes: dict[str, dict[str, Any]]) -> None:
    deployment = kubernetes["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == kubernetes["Service"]["spec"]["selector"]
    monitor = kubernetes["PodMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == labels and set(monitor["podTargetLabels"]) == set(labels)
    (port,) = deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert kubernetes["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert monitor["podMetricsEndpoints"][0]["port"] == port["name"]
    scaled = kubernetes["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert 1 <= scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] < behavior["scaleDown"]["stabilizationWindowSeconds"]


def test_the_autoscaler_asks_for_metrics_that_are_exported(kubernetes: dict[str, dict[str, Any]]) -> None:
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    observer.outcome("served", 1, 5.0)
    exported = {sample.name: set(sample.labels) for family in registry.collect() for sample in family.samples}
    exported |= {f"variator_compute_seconds_{end}": {"ratio"} for end in ("sum", "count")}  # of the first batch on
    assert {one.name for one in registry.collect()} >= {"variator_compute_seconds"}
    (trigger,) = kubernetes["ScaledObject"]["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    asked = re.findall(r"(variator_\w+)\{([^}]*)\}", query)
    assert len(asked) == len(re.findall("variator_", query)) > 0 and query.count("(") == query.count(")")
    (label,) = kubernetes["PodMonitor"]["spec"]["podTargetLabels"]
    for name, labels in asked:
        assert set(re.findall(r"(\w+)[!=]", labels)) <= {*exported[name], label}, name
    outcomes = {one for found in re.findall(r'outcome=~"([^"]*)"', query) for one in found.split("|")}
    assert outcomes <= {"served", "late", "dropped", "refused"}
    assert (trigger["type"], trigger["metricType"], trigger["metadata"]["threshold"]) == (
        "prometheus",
        "AverageValue",
        "1",
    ), "the query is the number of pods"


def test_kserve_takes_the_repository_with_a_triton_of_ours() -> None:
    found = documents("kserve.yaml")
    runtime, service = found["ServingRuntime"], found["InferenceService"]
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in runtime["spec"]["supportedModelFormats"] and model["modelFormat"]["name"] == "triton"
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert re.match(r"(pvc|s3|gs)://\w+/\w+", model["storageUri"])
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container" and container["args"][0] == "tritonserver"
    assert "--model-repository=/mnt/models" in container["args"] and "--load-model=variator" in container["args"]
    assert service["spec"]["predictor"]["minReplicas"] < service["spec"]["predictor"]["maxReplicas"]


def test_ray_takes_its_file_and_we_its_arguments() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed: pip install 'variator[ray]'")
    from variator.serving.ray import RaySettings, application

    read = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text(encoding="utf-8"))
    (one,) = schema.ServeDeploySchema(**read).applications
    assert one.import_path == f"{application.__module__}:{application.__name__}"
    settings = RaySettings.read(one.args)
    assert settings.min_replicas < settings.max_replicas and settings.server.threads > 0


def test_the_page_has_the_simulators_figures() -> None:
    record = json.loads((ROOT / "results" / "policies.json").read_text(encoding="utf-8"))
    fleet = policies.table(record).split("\n\n")[-1].strip()
    assert fleet.count("\n") == 15 and fleet in (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
