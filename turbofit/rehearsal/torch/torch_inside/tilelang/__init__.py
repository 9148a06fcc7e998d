"""A stand-in for TileLang, whose kernels do nothing here; LMDeploy allocates their output."""

from collections.abc import Callable
from typing import Any

from turbofit.rehearsal.torch.delta_nets import follow

__version__ = "0.0"


class _Keys:
    """Stands in for the compiler's options: the value of each option is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


PassConfigKey = _Keys()


def jit(*_: object, **__: object) -> Callable[..., Any]:
    """Return a kernel that takes any arguments and does nothing."""
    return lambda _: lambda *_, **__: lambda *_, **__: None


def set_log_level(_: str) -> None:
    """Log nothing."""


follow()
