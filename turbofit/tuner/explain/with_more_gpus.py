"""The same question for more GPUs of the kind that is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from turbofit.core.struct import known
from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["BOUGHT", "bought"]

#: The name of a machine that nobody has yet.
BOUGHT: Final = "more of these GPUs"


def bought(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest]]:
    """The remedy's words and the changed question, for 2, 4 and 8 of the GPU with most memory free.

    Only counts above those visible; no link joins them, so over in what splitting costs.
    """
    gpu = max(request.visible, key=lambda one: known(one.free, 0))
    for count in (2, 4, 8):
        if count <= len(request.visible):
            continue
        machine = replace(
            request.machine,
            name=BOUGHT,
            gpus=tuple(replace(gpu, index=i, uuid=f"{gpu.uuid}+{i}") for i in range(count)),
            links=(),
            visible=tuple(range(count)),
        )
        yield f"{count} x {gpu.name}", replace(request, machine=machine, tp=None, replicas=None)
