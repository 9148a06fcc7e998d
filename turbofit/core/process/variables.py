"""turbofit's own environment variables: their names, and the values that it validates.

`docs/environment.md` lists them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from turbofit.core.errors import UsageError

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
#: Variables of the keys that a server accepts; a client sends the first key. `keys_in` reads them.
SERVER_KEYS: Final = ("TURBOFIT_API_KEY", "TURBOFIT_API_KEYS")
#: Variables of the keys that the servers behind a gateway want. `keys_in` reads them.
UPSTREAM_KEYS: Final = ("TURBOFIT_UPSTREAM_KEY", "TURBOFIT_UPSTREAM_KEYS")
_LEASES: Final = "TURBOFIT_LEASES"


def keys_in(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys in the first of these environment variables that has a key.

    Commas separate keys. Messages do not show a key, since it is a secret.

    Raises:
        UsageError: a character of a key is no visible ASCII character, or a variable has commas
            alone: its keys are missing, and a server would be open to all.
    """
    for name in names:
        text = os.environ.get(name, "").strip()
        keys = tuple(filter(None, map(str.strip, text.split(","))))
        for key in keys:
            bad = next((place for place, char in enumerate(key, 1) if not "!" <= char <= "~"), 0)
            if bad:
                raise UsageError(
                    f"{name}: character {bad} of a key of {len(key)} is no visible ASCII"
                    " character, which an HTTP header cannot carry",
                    hint="use letters, digits and -_.~+/=; commas separate keys",
                )
        if keys:
            return keys
        if text:
            raise UsageError(f"{name} has no key", hint=f"write a key into it, or unset {name}")
    return ()


def leases_folder() -> Path | None:
    """Return the folder that ``TURBOFIT_LEASES`` names; None if the variable is unset or empty.

    Raises:
        UsageError: the path is not absolute, or is the path of a file.
    """
    text = os.environ.get(_LEASES, "").strip()
    if not text:
        return None
    folder = Path(os.path.expanduser(text))
    if not folder.is_absolute() or os.path.isfile(folder):
        what = "a file" if os.path.isfile(folder) else "not an absolute path"
        raise UsageError(
            f"{_LEASES} {text!r} is {what}: all turbofits of a machine share this folder",
            hint=f"give a folder such as {_LEASES}=/tmp/turbofit-leases, the same one everywhere",
        )
    return folder


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
