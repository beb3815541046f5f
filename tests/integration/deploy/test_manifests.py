"""The Kubernetes manifests: valid for the API's own schemas, hardened, and about names that exist."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

from sidestep.protocol.endpoints import Endpoint
from sidestep.protocol.keys import ServerKeys, client_keys, server_keys
from sidestep.worker.cli import build_parser
from sidestep.worker.config import WorkerConfig
from sidestep.worker.keys import make_keys

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
VERSIONS = ("1.29", "1.37")
"""The first Kubernetes whose sidecars are on by default, and the newest that there are schemas of."""
CUSTOM = {
    "JobSet": JobsetV1alpha2JobSet,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
    "TrainJob": TrainerV1alpha1TrainJob,
}


def resources() -> list[Any]:
    found = [(path.name, each) for path in FILES for each in yaml.safe_load_all(path.read_text("utf-8"))]
    return [pytest.param(each, id=f"{name}-{each['kind']}") for name, each in found]


def all_resources() -> list[Mapping[str, Any]]:
    return [each.values[0] for each in resources()]


def job_specs(resource: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    spec = resource["spec"]
    if resource["kind"] == "Job":
        yield spec
    elif resource["kind"] == "JobSet":
        yield from (each["template"]["spec"] for each in spec["replicatedJobs"])
    elif resource["kind"] == "TrainingRuntime":
        yield from (each["template"]["spec"] for each in spec["template"]["spec"]["replicatedJobs"])


def pods(resource: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if resource["kind"] == "StatefulSet":
        yield resource["spec"]["template"]["spec"]
    yield from (each["template"]["spec"] for each in job_specs(resource))


def containers(resource: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for pod in pods(resource):
        yield from (*pod.get("initContainers", ()), *pod["containers"])


def workers() -> list[Mapping[str, Any]]:
    return [each for resource in all_resources() for each in containers(resource) if each["image"] == "sidestep-worker"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("resource", resources())
def test_the_apis_own_schemas_take_it(resource: Mapping[str, Any], version: str) -> None:
    custom = CUSTOM.get(resource["kind"])
    if custom is None:
        kubernetes_validate.validate(resource, version, strict=True)
    else:
        # The models leave out what they do not know: what comes back must be the whole.
        made = custom.from_dict(dict(resource))
        assert made is not None
        assert made.to_dict() == resource
    for spec in job_specs(resource):
        # Their own schemas do not look into pods. A controller adds the restart policy where none is given.
        pod = {"restartPolicy": "Never", **spec["template"]["spec"]}
        job = {**spec, "template": {**spec["template"], "spec": pod}}
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": job}
        kubernetes_validate.validate(whole, version, strict=True)


def test_a_wrong_field_is_noticed() -> None:
    [jobset] = [each for each in all_resources() if each["kind"] == "JobSet"]
    wrong = {**jobset, "spec": {**jobset["spec"], "replicaJobs": []}}
    made = JobsetV1alpha2JobSet.from_dict(wrong)
    assert made is not None
    assert made.to_dict() != wrong
    [service] = [each for each in all_resources() if each["kind"] == "Service"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**service, "spec": {"clusterIp": "None"}}, VERSIONS[-1], strict=True)


def test_every_pod_and_container_is_hardened() -> None:
    for resource in all_resources():
        for pod in pods(resource):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            assert pod["enableServiceLinks"] is False, "a Service called sidestep-* sets SIDESTEP_* variables"
        for container in containers(resource):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            limits = container.get("resources", {}).get("limits", {})
            assert "memory" in limits or resource["kind"] == "TrainingRuntime", "a TrainJob gives the runtime's"


def test_workers_get_options_that_exist_and_the_time_to_drain() -> None:
    found = workers()
    assert len(found) == 2
    for worker in found:
        options = build_parser().parse_args(worker["args"])
        assert Endpoint.parse(options.endpoint).is_private or options.keys
        assert Path(options.journal).is_relative_to("/data"), "what outlives the pod"
    for resource in all_resources():
        for pod in pods(resource):
            if any(each["image"] == "sidestep-worker" for each in (*pod.get("initContainers", ()), *pod["containers"])):
                assert pod["terminationGracePeriodSeconds"] >= 45 > WorkerConfig().sink_drain_seconds + 2 + 8


def test_the_sidecar_is_a_native_one() -> None:
    [job] = [each for each in all_resources() if each["kind"] == "Job"]
    [worker] = job["spec"]["template"]["spec"]["initContainers"]
    assert worker["restartPolicy"] == "Always"
    assert "startupProbe" not in worker, "it would hold the trainer back"


def test_trainers_find_the_worker_behind_the_service() -> None:
    by_kind = {each["kind"]: each for each in all_resources()}
    service, [worker] = by_kind["Service"], list(containers(by_kind["StatefulSet"]))
    [port] = service["spec"]["ports"]
    ports = {each["name"]: each["containerPort"] for each in worker["ports"]}
    assert ports[port["targetPort"]] == port["port"]
    for kind in ("JobSet", "TrainingRuntime"):
        [trainer] = list(containers(by_kind[kind]))
        environment = {each["name"]: each.get("value") for each in trainer["env"]}
        assert environment["SIDESTEP_ENDPOINT"] == f"tcp://{service['metadata']['name']}:{port['port']}"
        assert environment["SIDESTEP_KEYS"] in {each["mountPath"] for each in trainer["volumeMounts"]}
    labels = by_kind["NetworkPolicy"]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    for kind in ("JobSet", "TrainingRuntime"):
        assert all(spec["template"]["metadata"]["labels"] == labels for spec in job_specs(by_kind[kind]))


def test_secrets_hold_the_key_files_where_each_side_looks_for_them(tmp_path: Path) -> None:
    """The how-to's own commands, as kubectl carries them out; then each side reads what its volume would hold."""
    make_keys(tmp_path / "keys")
    commands = {
        "sidestep-worker-keys": {"server.secret": "server.secret", "client.public": "clients/client.public"},
        "sidestep-trainer-keys": {"client.secret": "client.secret", "server.public": "server.public"},
    }
    how_to = (FOLDER / "README.md").read_text("utf-8")
    for secret, files in commands.items():
        given = [f"--from-file={key}=keys/{path}" for key, path in files.items()]
        assert f"kubectl create secret generic {secret} {' '.join(given)}" in how_to
        if shutil.which("kubectl"):
            made = subprocess.run(
                ["kubectl", "create", "secret", "generic", secret, *given, "--dry-run=client", "-o", "yaml"],
                cwd=tmp_path, check=True, capture_output=True, timeout=30, env={**os.environ, "HOME": str(tmp_path)},
            )  # fmt: skip
            assert set(yaml.safe_load(made.stdout)["data"]) == set(files)
    for resource in all_resources():
        for pod in pods(resource):
            for volume in pod["volumes"]:
                if "secret" in volume:
                    files = commands[volume["secret"]["secretName"]]
                    items = volume["secret"].get("items", [{"key": key, "path": key} for key in files])
                    assert {each["key"]: each["path"] for each in items} == files
                    assert volume["secret"]["defaultMode"] & 0o337 == 0, "nobody but root and the group may read it"
    endpoint, environment = Endpoint.parse("tcp://0.0.0.0:5757"), {"SIDESTEP_KEYS": str(tmp_path / "keys")}
    assert isinstance(server_keys(endpoint, tmp_path / "keys"), ServerKeys)
    assert client_keys(endpoint, environment) is not None
