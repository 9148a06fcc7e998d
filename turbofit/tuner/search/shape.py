"""A point of the search space, and the engine's options that it stands for."""

from __future__ import annotations

from math import ceil

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["Shape", "shape_settings"]


class Shape(Struct):
    """A point of the search space.

    ``units_per_forward`` None pays for the engine's own bound; ``promised`` is the context that
    engines on other cards hold. ``at_once`` are the requests that are there in each group at any
    time; None: an even share of the workload's, or the best batch. ``prefills`` are what groups
    on unequal cards may choose from, each for itself; empty where all run the same settings.
    """

    tp: int
    groups: tuple[tuple[int, ...], ...]
    max_prefill_token_num: int
    limit: int | None
    units_per_forward: int | None = None
    promised: int | None = None
    at_once: float | None = None
    prefills: tuple[int, ...] = ()

    @property
    def replicas(self) -> int:
        """Groups that serve side by side."""
        return len(self.groups)

    def requests(self, concurrency: int | None) -> float:
        """Requests that are there in each group at any time, of so many over all groups.

        One where nothing is said of either: the batch that every shape can run.
        """
        if self.at_once is not None:
            return self.at_once
        return 1.0 if concurrency is None else concurrency / self.replicas


def shape_settings(
    request: ResolvedRequest, shape: Shape, session_len: int, dtype: str
) -> Settings:
    """The engine's options for a shape; what the user fixed stays.

    Raises:
        UsageError: a fixed option has a value that LMDeploy does not take.
    """
    # A draft's weights would be taken for quantised too; the checkpoint says what it is.
    quantization = None if "speculative" in request.fixed else request.model.quantization
    chosen: dict[str, object] = {
        "dtype": dtype,
        "max_batch_size": max(1, ceil(shape.requests(request.workload.concurrency))),
        "session_len": session_len,
        "model_format": quantization.method if quantization else None,
    }
    chosen.update(request.fixed)
    chosen.update(tp=shape.tp, max_prefill_token_num=shape.max_prefill_token_num)
    try:
        return msgspec.convert(chosen, Settings)
    except msgspec.ValidationError as exc:
        raise UsageError(
            f"an engine option cannot be used: {exc}", hint="see turbofit plan --help"
        ) from None
