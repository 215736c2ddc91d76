"""The manifest of one attempt: what Kubernetes accepts, and what was promised to be in it."""

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tunery.kubernetes import Pod, attempt_job

ROOT = Path(__file__).parent.parent
ATTEMPT, NODE = (uuid.UUID(f"01920000-0000-7000-8000-00000000000{number}") for number in (1, 2))
RELEASES = ("1.29", "1.33", "1.37")


@pytest.fixture
def job() -> dict[str, Any]:
    return attempt_job(ATTEMPT, NODE)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("pod", [Pod(), Pod(image="registry.example/worker:2", gpus=8, memory="512Gi", cpu="64")])
def test_kubernetes_takes_it(release: str, pod: Pod) -> None:
    kubernetes_validate.validate(attempt_job(ATTEMPT, NODE, limit_s=1800.5, pod=pod), release, strict=True)


def test_and_would_refuse_what_is_wrong(job: dict[str, Any]) -> None:
    job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0].pop("mountPath")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, RELEASES[-1], strict=True)


def test_what_was_promised_is_there(job: dict[str, Any]) -> None:
    spec = job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], pod["restartPolicy"]) == (2, 86_400, "OnFailure")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "32Gi", "cpu": "8"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {name for name, volume in volumes.items() if "persistentVolumeClaim" in volume} == {"cache", "output"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes["secrets"]["secret"]["secretName"] == "tunery-worker"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys() and mounts["shm"] == "/dev/shm"


def test_a_jobs_own_limit_ends_it_after_its_trainer_had_time_to_save() -> None:
    assert attempt_job(ATTEMPT, NODE, limit_s=1800)["spec"]["activeDeadlineSeconds"] == 1950


def test_it_runs_a_module_that_exists_and_no_secret_is_written_out(job: dict[str, Any]) -> None:
    [container] = job["spec"]["template"]["spec"]["containers"]
    program, flag, module, attempt = container["command"]
    assert (program, flag, attempt) == ("python", "-m", str(ATTEMPT))
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    named = {variable["name"] for variable in container["env"]}
    assert named == {"TUNERY_NODE_ID", "TUNERY_HOME", "TUNERY_MODEL_STORE", "TUNERY_SECRETS_DIR"}


def test_the_example_is_what_the_command_prints() -> None:
    command = [sys.executable, "-m", "tunery.cli", "node", "manifest", str(ATTEMPT), str(NODE)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout
    assert json.loads(printed) == json.loads((ROOT / "deploy/kubernetes/attempt-job.json").read_text())
