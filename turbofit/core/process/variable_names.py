"""The names of turbofit's environment variables, without the code that validates them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

PREFIX: Final = "TURBOFIT_"
#: All variables of turbofit that do not set an option. People set the variables of the first two
#: lines; turbofit sets the others for its child processes. Tests and benches set the last variable,
#: a folder with a CUDA build of torch.
VARIABLES: Final = frozenset((
    "TURBOFIT_API_KEYS", "TURBOFIT_API_KEY", "TURBOFIT_UPSTREAM_KEYS", "TURBOFIT_UPSTREAM_KEY",
    "TURBOFIT_LEASES", "TURBOFIT_NODE_SPEC",
    "TURBOFIT_IMAGE_THREADS", "TURBOFIT_IMAGE_CACHE",
    "TURBOFIT_ENGINE_KEY", "TURBOFIT_PRETEND_SCENARIO", "TURBOFIT_PRETEND_LIBRARIES",
    "TURBOFIT_PRETEND_MACHINE", "TURBOFIT_PRETEND_TWIN", "TURBOFIT_PRETEND_ENGINE",
    "TURBOFIT_REHEARSAL", "TURBOFIT_TRACE_STUBS", "TURBOFIT_CUDA_PATH",
))  # fmt: skip
#: Variables that Kubernetes sets for a service: ``TURBOFIT_X_PORT_80_TCP_ADDR`` and so on.
_SERVICE_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")


def without_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that set options of turbofit.

    The result is for a child process that runs turbofit.
    """
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(PREFIX) or name in VARIABLES
    }


def is_service_address(value: str) -> bool:
    """Return whether a value is the address of a Kubernetes Service, as in ``NAME_PORT``."""
    return value.startswith(("tcp://", "udp://", "sctp://"))


def is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes set the variable, for a Service named ``turbofit...``."""
    return bool(_SERVICE_LINK.search(name)) or is_service_address(value)
