"""The answers of the checks, and their sources; tests replace the sources to simulate failures."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from turbofit.core.installation import image_library, installed
from turbofit.core.process import network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.errors import TurbofitError
    from turbofit.core.machine import Host, Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan
    from turbofit.machine.kernels.census import Census

State = Literal["ok", "warning", "stops", "unreadable"]
#: The occasions of a check: in `doctor` (install), for a plan's warnings, before a run takes
#: resources (launch), under the lock of the leases with the machine measured again (lease), and
#: before each start of engines.
When = Literal["install", "plan", "launch", "lease", "start"]

CHILD_SECONDS: Final = 60.0
#: A program that prints torch's architectures, also on a machine without a GPU.
_ARCHITECTURES: Final = (
    "import torch; f = getattr(torch._C, '_cuda_getArchFlags', None); print(f() if f else '')"
)


class Answer(NamedTuple):
    """The answer of a check.

    ``why`` and ``error``, if given, replace the effect and the exception of the check.
    """

    state: State
    seen: str
    fix: str = ""
    why: str = ""
    error: type[TurbofitError] | None = None


#: The answer if nothing is wrong.
ok: Final = partial(Answer, "ok")
#: The answer if serving works, but slower, with less memory, or at a risk.
warning: Final = partial(Answer, "warning")
#: The answer if serving does not work; a launch raises ``error``.
stops: Final = partial(Answer, "stops")
#: The answer if the value cannot be read.
unreadable: Final = partial(Answer, "unreadable")


class Scene(NamedTuple):
    """The values that a check may use; a check does not apply if its value is None.

    ``machine`` is the present machine. ``model`` is the model to serve, on ``port``; ``server`` is
    a run that already listens on the port. For a launch, ``plan`` is the plan to launch, ``folder``
    the folder for its logs, and ``ports`` are the ports of its engines.
    """

    sources: Sources
    when: When
    machine: Machine | None = None
    host: Host | None = None
    model: Model | None = None
    port: int | None = None
    server: str = ""
    plan: Plan | None = None
    folder: Path | None = None
    ports: Sequence[int] = ()
    pretend: bool = False


class Sources:
    """Reads the real machine and the real process.

    Args:
        environ: the environment, by default the process's own.
        root: the folder that contains ``/proc``, ``/sys`` and ``/var/log``.
    """

    version = staticmethod(installed)
    image_library = staticmethod(image_library)
    port_problem = staticmethod(network.port_problem)
    open_files = staticmethod(network.open_files)

    def __init__(self, environ: Mapping[str, str] | None = None, root: str = "/") -> None:
        self.environ: Mapping[str, str] = os.environ if environ is None else environ
        self.root = Path(root)

    def requires(self, package: str) -> list[str]:
        """Return the requirements in an installed package's metadata; empty if there are none."""
        from importlib import metadata

        return (metadata.requires(package) or []) if installed(package) else []

    def package_folder(self, package: str) -> Path | None:
        """Return the folder of a package's modules, found without an import, or None."""
        from importlib.util import find_spec

        try:
            spec = find_spec(package)
        except (ImportError, ValueError):
            return None
        folders = list(spec.submodule_search_locations or []) if spec else []
        return Path(folders[0]) if folders else None

    def has_module(self, name: str) -> bool:
        """Return whether a module of this name exists; it is not imported."""
        from importlib.util import find_spec

        return find_spec(name) is not None

    def torch_architectures(self) -> list[str] | None:
        """Return torch's architectures, from a child process; None if it does not answer."""
        from turbofit.core.process.processes import output_of  # imported late: plans do without it

        words, env = [sys.executable, "-c", _ARCHITECTURES], {"CUDA_VISIBLE_DEVICES": ""}
        output = output_of(words, CHILD_SECONDS, {**self.environ, **env})
        return None if output is None else output.decode().split()

    def host(self) -> Host:
        """Return the host memory that this process may use, and its cores."""
        from turbofit.machine.host import read_host

        root = self.root
        return read_host(
            proc=str(root / "proc"), cgroup=str(root / "sys/fs/cgroup"), shm=str(root / "dev/shm")
        )

    def kernels(self) -> Census | None:
        """Return the kernels of the installed TurboMind; None if they cannot be read."""
        from turbofit.machine.kernels.census import installed as installed_kernels

        return installed_kernels()

    def disk_free(self, path: str) -> tuple[int, bool] | None:
        """Return a folder's free disk bytes, and whether it is writable; None if unknown."""
        folder = Path(path)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            stat = os.statvfs(folder)
        except OSError:
            return None
        return stat.f_bavail * stat.f_frsize, os.access(folder, os.W_OK)
