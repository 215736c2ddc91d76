"""One attempt as a Kubernetes Job: the manifest, as plain values. Nothing here talks to a cluster."""

import uuid
from dataclasses import dataclass
from typing import Any

DEADLINE_S = 86_400
_HOME, _CACHE, _SECRETS = "/var/lib/tunery", "/cache", "/run/secrets/tunery"
_USER = 10_001
"""The user of Dockerfile.worker."""
_STOP_S = 150
"""A trainer saves a checkpoint first: TUNERY_STOP_GRACE_S is 120."""


@dataclass(frozen=True)
class Pod:
    """What a pod is made of. Sizes are Kubernetes quantities; times in seconds."""

    image: str = "tunery-worker:latest"
    namespace: str = "tunery"
    gpus: int = 1
    memory: str = "32Gi"
    cpu: str = "8"
    shared_memory: str = "8Gi"
    """Data loaders and NCCL; the usual 64 MB end in a bus error."""
    secret: str = "tunery-worker"  # noqa: S105 - the name of a Secret, which is referred to and never read
    cache_claim: str = "tunery-cache"
    """Base models, shared by all attempts."""
    output_claim: str = "tunery-output"
    """Workspaces: what a restarted pod finds again."""


def attempt_job(
    attempt_id: uuid.UUID, node_id: uuid.UUID, *, limit_s: float | None = None, pod: Pod | None = None
) -> dict[str, Any]:
    """`batch/v1` Job that runs the supervisor of one attempt, which is assigned to `node_id`, to its end.

    The lease decides who runs the attempt: a pod that comes second finds nothing to claim and ends with 0, so the
    two retries of the Job are harmless. `limit_s` is the attempt's own; at most a day without one.
    """
    pod = pod or Pod()
    labels = {
        "app.kubernetes.io/name": "tunery",
        "app.kubernetes.io/component": "attempt",
        "tunery/attempt": str(attempt_id),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"tunery-attempt-{attempt_id}", "namespace": pod.namespace, "labels": labels},
        "spec": {
            "backoffLimit": 2,
            "activeDeadlineSeconds": DEADLINE_S if limit_s is None else max(1, round(limit_s)) + _STOP_S,
            "ttlSecondsAfterFinished": DEADLINE_S,
            "template": {"metadata": {"labels": labels}, "spec": _pod(attempt_id, node_id, pod)},
        },
    }


def _pod(attempt_id: uuid.UUID, node_id: uuid.UUID, pod: Pod) -> dict[str, Any]:
    return {
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": _STOP_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [_container(attempt_id, node_id, pod)],
        "volumes": [
            {"name": "cache", "persistentVolumeClaim": {"claimName": pod.cache_claim}},
            {"name": "output", "persistentVolumeClaim": {"claimName": pod.output_claim}},
            {"name": "secrets", "secret": {"secretName": pod.secret, "defaultMode": 0o440}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shared_memory}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        ],
    }


def _container(attempt_id: uuid.UUID, node_id: uuid.UUID, pod: Pod) -> dict[str, Any]:
    room = {"nvidia.com/gpu": str(pod.gpus), "memory": pod.memory, "cpu": pod.cpu}
    environment = {
        "TUNERY_NODE_ID": str(node_id),
        "TUNERY_HOME": _HOME,
        "TUNERY_MODEL_STORE": f"{_CACHE}/models",
        # files of a mounted Secret, named after the settings: an environment is shown to whoever may look at a pod
        "TUNERY_SECRETS_DIR": _SECRETS,
    }
    return {
        "name": "attempt",
        "image": pod.image,
        "command": ["python", "-m", "worker.supervisor", str(attempt_id)],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {"requests": room, "limits": room},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "cache", "mountPath": _CACHE},
            {"name": "output", "mountPath": _HOME},
            {"name": "secrets", "mountPath": _SECRETS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
        ],
    }
