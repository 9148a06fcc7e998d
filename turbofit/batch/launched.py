"""A server for one batch: what the plan must promise is read from the items, then it is started."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.batch.images import ImageLimits
from turbofit.batch.server_process import ServerProcess
from turbofit.batch.workload import workload_of
from turbofit.core.errors import UsageError
from turbofit.planning.resolve import model_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.batch.batch_input import BatchInput
    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.batch.workload import BatchWorkload
    from turbofit.planning.request import PlanRequest

__all__ = ["ServerPlan", "limits_and_places", "server_plan"]

#: Options of the batch that are the server's.
_LAUNCH: Final = ("allowed_media_domains", "pretend", "no_rehearse")


class ServerPlan(NamedTuple):
    """A request that promises what the items need, and the options of ``turbofit serve`` for it."""

    request: PlanRequest
    workload: BatchWorkload
    options: tuple[str, ...]


def server_plan(
    source: BatchInput, spec: BatchSpec, request: PlanRequest, tick: Callable[[int], None]
) -> ServerPlan:
    """Read all items; what a person has given of the plan stays.

    Raises:
        UsageError: there is no such model, or it cannot be handed to another process.
    """
    if not isinstance(request.model, str):
        raise UsageError("a batch starts a model by its name", hint="give a name or a folder")
    workload = workload_of(source, model_of(request), tick)
    found = request.changed(**workload.keywords(request.given(), shrink=spec.shrink))
    # How many are sent at once is a load, and no promise that the plan must keep.
    arguments = [request.model, *found.option_arguments(("model", "concurrency"))]
    arguments += spec.option_arguments(spec.model_fields_set - set(_LAUNCH))
    return ServerPlan(found, workload, tuple(arguments))


async def limits_and_places(
    server: ServerProcess, request: PlanRequest, *, shrink: bool
) -> tuple[ImageLimits, int]:
    """What images may be at a server that is open, and how many items it runs at once."""
    places, limits = server.running(await asyncio.to_thread(server.record))
    rule = model_of(request).image_rule
    if limits is None or rule is None or limits.vision_unit is None:
        return ImageLimits(), places
    return ImageLimits(
        bytes=limits.bytes_per_image, rule=rule, units=limits.units_per_image,
        limit=limits.image_limit, shrink=shrink,
    ), places  # fmt: skip
