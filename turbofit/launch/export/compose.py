"""A plan as a Docker Compose file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.launch.export.containers import HEALTHY, HUB, STATE, dump, header

if TYPE_CHECKING:
    from turbofit.launch.export.service import Service

__all__ = ["compose_file"]

_INTERVAL: Final = "10s"


def compose_file(service: Service, *, image: str) -> str:
    """The file's text; the gateway is published on the host's loopback only.

    Args:
        service: what to run.
        image: a container image that has turbofit and LMDeploy in it.
    """
    devices: dict[str, Any] = {"driver": "nvidia", "capabilities": ["gpu"]}
    if service.uuids:
        devices["device_ids"] = list(service.uuids)
    else:
        devices["count"] = service.gpus
    reservations = {"memory": f"{-(-service.memory >> 20)}M", "devices": [devices]}
    body: dict[str, Any] = {
        "image": image,
        "entrypoint": list(map(_plain, service.argv)),
        "environment": {
            "PYTHONUNBUFFERED": "1",
            "TURBOFIT_API_KEYS": "${TURBOFIT_API_KEYS:?a key that clients must send}",
            "HF_HOME": HUB,
            "XDG_STATE_HOME": STATE,
        },
        "ports": [f"127.0.0.1:{service.port}:{service.port}"],
        "volumes": [f"hub:{HUB}", f"state:{STATE}", *map(_mount, service.folders)],
        "deploy": {"resources": {"reservations": reservations}},
        "ulimits": {"memlock": -1},
        "healthcheck": {
            "test": ["CMD", *HEALTHY, f"http://127.0.0.1:{service.port}/health"],
            "interval": _INTERVAL,
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{service.start}s",
        },
        "stop_grace_period": f"{service.stop}s",
        "restart": "on-failure",
    }
    if service.shm:
        body["shm_size"] = f"{-(-service.shm >> 20)}m"
    document = {"services": {service.name: body}, "volumes": {"hub": {}, "state": {}}}
    told = header(service, "compose", "TURBOFIT_API_KEYS=KEY docker compose up -d", image)
    return told + dump(document)


def _mount(folder: str) -> dict[str, Any]:
    """The long form: in the short one a colon separates the two paths of a volume."""
    place = _plain(folder)
    return {"type": "bind", "source": place, "target": place, "read_only": True}


def _plain(word: str) -> str:
    """A word without variables: $ is Compose's own."""
    return word.replace("$", "$$")
