"""A point of the search space, the engine's options that it stands for, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.core.plan import Candidate, Settings
from turbofit.core.struct import Struct
from turbofit.memory.account import AMPERE, HOPPER, VisionLoad, capability_of
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.speed.throughput import Speed

__all__ = ["Evaluation", "Shape", "chosen_dtype", "dtype_for", "shape_settings"]


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
    dtype: str
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


class Evaluation(Struct):
    """A shape with its settings, and whether it serves.

    ``short`` is how many bytes are missing on the tightest GPU of a shape that does not; why it
    does not is told by `candidates.explain`, since a search needs the words of few shapes.
    ``score`` is the goal's value, ``served`` the share of the vision units asked for that it
    serves, ``queues`` whether image requests wait though nobody asked for that. ``parts`` are the
    sets of like groups where cards are unequal; ``settings`` and ``kv_tokens`` are then those of
    the weakest, ``speeds`` are in the order of the shape's groups. With the goal of latency
    ``seconds_per_answer`` is the slowest group's, with the requests that were asked for there, or
    with one. ``wants_cache``: more cache would run more requests at once. ``footprint`` are the
    bytes of all GPUs that it takes, where the least is asked for, and 0 elsewhere. ``held`` are the
    requests that all its engines run and hold at once, where a person says how many there must be,
    and 0 elsewhere; of a shape that holds too few ``settings`` have the largest batch that it
    holds.
    """

    engine: str
    shape: Shape
    settings: Settings
    vision_load: VisionLoad
    kv_tokens: int
    fits: bool
    score: float = 0.0
    served: float = 1.0
    queues: bool = False
    short: int = 0
    speeds: tuple[Speed, ...] = ()
    seconds_per_answer: float = 0.0
    wants_cache: bool = False
    footprint: int = 0
    held: int = 0
    parts: tuple[Evaluation, ...] = ()

    def of_group(self, group: tuple[int, ...]) -> Evaluation:
        """What one of the shape's groups runs."""
        return next((part for part in self.parts if group in part.shape.groups), self)

    @property
    def sets(self) -> tuple[Evaluation, ...]:
        """The sets of like groups; the shape itself where all run the same settings."""
        return self.parts or (self,)

    @property
    def serves(self) -> bool:
        """Whether it serves, though perhaps fewer requests at once than were asked for."""
        return self.fits or self.held > 0

    @property
    def worth(self) -> tuple[float, int, int, float]:
        """What clients get: images as large as was asked, the context, then the goal's value.

        A promise comes before speed, so that none is smaller where there is more memory. Memory
        comes between them where the least is asked for.
        """
        return (self.served, self.settings.session_len, -self.footprint, self.score)

    @property
    def rank(self) -> tuple[float, ...]:
        """What is compared: what clients get, without queues where that costs nothing, tokens.

        Last the larger prefill, then fewer shards.
        """
        shape = self.shape
        return (
            *self.worth, not self.queues, self.kv_tokens, shape.max_prefill_token_num, -shape.tp
        )  # fmt: skip

    def candidate(self, why_not: str) -> Candidate:
        """The row of ``considered``."""
        kept = ("max_prefill_token_num", "max_batch_size", "session_len", "cache_max_entry_count")
        settings: dict[str, Any] = {name: getattr(self.settings, name) for name in kept}
        if self.parts:
            each = [self.of_group(group).settings for group in self.shape.groups]
            settings["by_group"] = [{name: getattr(one, name) for name in kept} for one in each]
        if self.shape.limit is not None:
            settings["limit"] = self.shape.limit
        return Candidate(
            engine=self.engine,
            tp=self.shape.tp,
            replicas=self.shape.replicas,
            groups=self.shape.groups,
            settings=settings,
            fits=self.fits,
            kv_tokens=self.kv_tokens,
            score=self.score,
            why_not=why_not,
        )


def shape_settings(request: ResolvedRequest, shape: Shape, session_len: int) -> Settings:
    """The engine's options for a shape; what the user fixed stays.

    Raises:
        UsageError: a fixed option has a value that LMDeploy does not take.
    """
    # A draft's weights would be taken for quantised too; the checkpoint says what it is.
    quantization = None if "speculative" in request.fixed else request.model.quantization
    chosen: dict[str, object] = {
        "dtype": shape.dtype,
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


def dtype_for(model: Model, gpus: Sequence[Gpu]) -> tuple[Literal["float16", "bfloat16"], str]:
    """The dtype that ``auto`` becomes on these GPUs, and why; LMDeploy says nothing of it.

    AWQ, GPTQ and packed int4 run in float16; cards before Ampere have no bfloat16, and a card that
    does not tell has it. On Hopper int4 runs in bfloat16 too, and gated delta nets in nothing else.
    """
    packed = model.quantization
    cards = [capability_of(gpu, unknown=AMPERE) for gpu in gpus]
    if packed is not None and packed.bits == 4 and not packed.of_experts:
        if model.text.delta is not None and all(card == HOPPER for card in cards):
            return "bfloat16", "gated delta nets run in bfloat16 on Hopper"
        return "float16", f"{packed.method} runs in float16"
    if any(card < AMPERE for card in cards):
        return "float16", "these GPUs have no bfloat16"
    if model.dtype == "float16":
        return "float16", "the checkpoint's own"
    return "bfloat16", "the checkpoint's own" if model.dtype == "bfloat16" else "of float32"


def chosen_dtype(model: Model, fixed: object, gpus: Sequence[Gpu]) -> str:
    """The user's dtype, or what ``auto`` becomes on these GPUs.

    Raises:
        UsageError: they cannot run the user's, and LMDeploy would change it without a word.
    """
    possible, why = dtype_for(model, gpus)
    if not isinstance(fixed, str) or fixed == "auto":
        return possible
    if fixed == "bfloat16" and possible == "float16" and why != "the checkpoint's own":
        raise UsageError(
            f"--dtype bfloat16 cannot run: {why}",
            hint="leave --dtype out: float16 is chosen where it is needed",
        )
    return fixed
