"""The planned device map as command lines of the fallback engine, one a copy of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.core.plan import Command
from turbofit.planning.commands import DEFAULT_PORT, commands, model_path, visible_devices
from turbofit.planning.device_maps import folded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan

__all__ = [
    "MODULE",
    "any_commands",
    "fallback_commands",
    "private_fallback_commands",
    "refuse_options",
]

#: What is run, with ``python -m``.
MODULE: Final = "turbofit.launch.fallback.server"
#: Torch grows its segments in place: without it the cache, which grows by a token at a time, and
#: the loader leave holes.
_ALLOCATOR: Final = "expandable_segments:True"


def any_commands(plan: Plan, *, port: int = DEFAULT_PORT) -> tuple[Command, ...]:
    """The plan's commands on loopback, LMDeploy's or the fallback engine's as it is planned for."""
    made = commands if plan.engine.of_lmdeploy else fallback_commands
    return made(plan, port=port)


def fallback_commands(
    plan: Plan, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT
) -> tuple[Command, ...]:
    """One command for each copy, on consecutive ports from ``port`` on.

    The first word is ``turbofit-fallback``: whoever runs it puts ``python -m`` and `MODULE` there.

    Raises:
        UsageError: the plan is another engine's.
    """
    ports = [port + number for number in range(len(plan.parallel.groups))]
    name = plan.model.hub_id or plan.model.name
    return _commands(plan, host, ports, model_path(plan.model), name)


def private_fallback_commands(
    plan: Plan, ports: Sequence[int], folder: str, name: str
) -> tuple[Command, ...]:
    """The commands behind a gateway: loopback, given ports.

    Args:
        plan: what to launch.
        ports: one a copy.
        folder: the model folder.
        name: what clients call the model.

    Raises:
        UsageError: the plan is another engine's.
    """
    return _commands(plan, "127.0.0.1", ports, folder, name)


def refuse_options(options: Sequence[str]) -> None:
    """What only LMDeploy can be started with.

    Raises:
        UsageError: one of it was asked for.
    """
    if options:
        raise UsageError(
            f"{options[0]} is an option of LMDeploy, which the plan does not run",
            hint="leave out what follows --",
        )


def _commands(
    plan: Plan, host: str, ports: Sequence[int], path: str, name: str
) -> tuple[Command, ...]:
    if plan.engine.of_lmdeploy or plan.device_map is None:
        raise UsageError(
            f"the plan is for {plan.engine.name}, not for the fallback engine",
            hint="plan with --engine transformers",
        )
    settings = plan.settings
    return tuple(
        Command(
            env={
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": visible_devices(plan.machine, group),
                "PYTORCH_CUDA_ALLOC_CONF": _ALLOCATOR,
            },
            argv=(
                "turbofit-fallback",
                "--model", path,
                "--served-name", name,
                "--device-map", folded(plan.device_map),
                "--dtype", settings.dtype,
                "--session-len", str(settings.session_len),
                "--max-images", str(plan.limits.most_images(plan.model.image_rule)),
                "--host", host,
                "--port", str(port),
            ),
            group=number,
        )
        for number, (group, port) in enumerate(zip(plan.parallel.groups, ports, strict=True))
    )  # fmt: skip
