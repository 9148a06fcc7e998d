"""A plan as Kubernetes objects: a Deployment and its Service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.launch.export.containers import HUB, STATE, dump, header

if TYPE_CHECKING:
    from turbofit.launch.export.service import Service

__all__ = ["k8s_objects"]

_PERIOD: Final = 10
#: Periods without a listening gateway before the pod counts as hung. Not /health: while the
#: supervisor starts an engine again, that is 503, and a killed pod would begin from nothing.
_HUNG: Final = 6


def k8s_objects(service: Service, *, image: str, claim: str | None = None) -> str:
    """The manifest's text; keys come from the Secret ``NAME-keys``.

    Args:
        service: what to run.
        image: a container image that has turbofit and LMDeploy in it.
        claim: a PersistentVolumeClaim for the hub's cache; without one each pod downloads anew.
    """
    labels = {"app.kubernetes.io/name": service.name}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": service.name, "labels": labels},
        "spec": {
            "replicas": 1,
            # Two pods would need the GPUs twice.
            "strategy": {"type": "Recreate"},
            # Longer than a start may take, so that a slow start does not count as failed.
            "progressDeadlineSeconds": service.start + _PERIOD,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": _pod(service, image, claim)},
        },
    }
    front = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service.name, "labels": labels},
        "spec": {
            "selector": labels,
            "ports": [{"name": "http", "port": service.port, "targetPort": "http"}],
        },
    }
    secret = f"kubectl create secret generic {service.name}-keys --from-literal=keys=KEY"
    told = header(service, "k8s", f"{secret}\n#   kubectl apply -f FILE", image)
    return told + dump(deployment, front)


def _pod(service: Service, image: str, claim: str | None) -> dict[str, Any]:
    """The pod: one container, its volumes, and as long to end as a drain takes."""
    mounts = [{"name": "hub", "mountPath": HUB}, {"name": "state", "mountPath": STATE}]
    hub: dict[str, Any] = {"emptyDir": {}}
    if claim:
        hub = {"persistentVolumeClaim": {"claimName": claim}}
    volumes: list[dict[str, Any]] = [{"name": "hub", **hub}, {"name": "state", "emptyDir": {}}]
    if service.shm:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        shm = {"medium": "Memory", "sizeLimit": f"{-(-service.shm >> 20)}Mi"}
        volumes.append({"name": "shm", "emptyDir": shm})
    for name, folder in zip(("model", "draft"), service.folders, strict=False):
        mounts.append({"name": name, "mountPath": folder})
        volumes.append({"name": name, "hostPath": {"path": folder, "type": "Directory"}})
    return {
        "terminationGracePeriodSeconds": service.stop,
        "containers": [{**_container(service, image), "volumeMounts": mounts}],
        "volumes": volumes,
    }


def _container(service: Service, image: str) -> dict[str, Any]:
    """The container: the gateway opens its port only once an engine answered its worst case."""
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": _PERIOD}
    keys = {"secretKeyRef": {"name": f"{service.name}-keys", "key": "keys"}}
    return {
        "name": "turbofit",
        "image": image,
        # $(NAME) would be a variable's value.
        "command": [word.replace("$(", "$$(") for word in service.argv],
        "env": [
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            {"name": "HF_HOME", "value": HUB},
            {"name": "XDG_STATE_HOME", "value": STATE},
            {"name": "TURBOFIT_API_KEYS", "valueFrom": keys},
        ],
        "ports": [{"name": "http", "containerPort": service.port}],
        "resources": {
            "limits": {"nvidia.com/gpu": service.gpus},
            "requests": {"memory": f"{-(-service.memory >> 20)}Mi"},
        },
        "startupProbe": {**health, "failureThreshold": -(-service.start // _PERIOD)},
        "readinessProbe": {**health, "timeoutSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {
            "tcpSocket": {"port": "http"},
            "periodSeconds": _PERIOD,
            "failureThreshold": _HUNG,
        },
    }
