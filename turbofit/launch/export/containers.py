"""What Compose and Kubernetes have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import yaml

from turbofit.core.messages import plural

if TYPE_CHECKING:
    from turbofit.launch.export.service import Service

__all__ = ["HEALTHY", "HUB", "STATE", "dump", "header"]

#: Where the hub's cache and turbofit's state lie in the container, whoever its user is.
HUB: Final = "/var/cache/huggingface"
STATE: Final = "/var/lib/turbofit"

#: Ends with 0 where the URL that follows answers 200; images have Python and often no curl.
HEALTHY: Final = (
    "python3", "-c", "import sys,urllib.request as u;u.urlopen(sys.argv[1],timeout=4)",
)  # fmt: skip


def header(service: Service, kind: str, start: str, image: str) -> str:
    """The comment at the top of a manifest."""
    cards = f"{service.gpus} {plural(service.gpus, 'GPU')}"
    return (
        f"# Written by `turbofit export {kind}`. Start it:\n"
        f"#   {start}\n"
        f"# Planned for {cards}: {service.card}. It measures and plans again at\n"
        "# every start. The engine listens on the container's loopback, behind the gateway.\n"
        "# The image has turbofit with LMDeploy, and a C compiler for the rehearsal. In a clone\n"
        "# of turbofit's repository its Dockerfile makes it:\n"
        f"#   docker build --tag {image} .\n"
    )


def dump(*documents: dict[str, Any]) -> str:
    """YAML in the order given, every value written out."""
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=100)


class _Plain(yaml.SafeDumper):
    """A YAML dumper without anchors: people read a manifest."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True
