"""How the two engines on torch differ where they are rehearsed without a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["DRIVERS", "TorchDriver"]


class TorchDriver(NamedTuple):
    """One engine.

    ``package`` has it, ``packages`` are all that it runs; ``loaded`` is the phase at whose end the
    weights alone are there; ``batches``: whether requests meet, and LMDeploy's options mean
    something.
    """

    title: str
    package: str
    packages: tuple[str, ...]
    loaded: str
    batches: bool


DRIVERS: Final[Mapping[str, TorchDriver]] = {
    "pytorch": TorchDriver(
        title="LMDeploy's PyTorch engine",
        package="lmdeploy",
        packages=("torch", "triton", "lmdeploy", "transformers"),
        loaded="sizing",
        batches=True,
    ),
    "transformers": TorchDriver(
        title="Transformers",
        package="transformers",
        packages=("torch", "transformers", "accelerate"),
        loaded="load",
        batches=False,
    ),
}
