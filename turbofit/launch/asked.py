"""What a caller's keywords ask for: a model, a machine and a workload, checked and normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import fields, replace

from turbofit.core.errors import UsageError
from turbofit.core.plan import Goal, Settings, Workload
from turbofit.core.units import parse_bytes
from turbofit.machine.source import machine_from
from turbofit.model.source import resolve_model
from turbofit.observe.calibrations import pretends, with_calibrations
from turbofit.tuner.ask import Ask, Margin, check_limits

if TYPE_CHECKING:
    from typing import Any

    from turbofit.core.machine import Machine
    from turbofit.core.model import Model

__all__ = ["asked_of", "checked", "workload_of"]

_SETTINGS = frozenset(field.name for field in fields(Settings)) - {"tp"}


def asked_of(
    model: str | Model,
    on: str | Machine | None,
    gpus: str | None,
    revision: str | None,
    margin: int | str | None,
    budget: int | str | None,
    settings: dict[str, Any],
) -> Ask:
    """The ask without workload, shape and limits; arguments as for :func:`turbofit.api.plan`.

    Raises:
        As :func:`turbofit.api.plan`.
    """
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise UsageError(
            f"{unknown[0]} is not an option that turbofit sets",
            hint=f"it sets {', '.join(sorted(_SETTINGS))}",
        )
    fixed = {name: value for name, value in settings.items() if value is not None}
    resolved = resolve_model(model, revision=revision) if isinstance(model, str) else model
    if revision is not None:
        resolved = replace(resolved, revision=revision)
    machine = machine_from(on, gpus=gpus) if on is None or isinstance(on, str) else on
    if machine.source == "nvml":
        machine = with_calibrations(machine, pretend=pretends())
    return Ask(
        model=resolved,
        machine=machine,
        workload=Workload(),
        fixed=fixed,
        margin=_margin(margin),
        budget=parse_bytes(budget, what="--budget") if isinstance(budget, str) else budget,
    )


def workload_of(
    images: int,
    image_size: tuple[int, int] | None,
    context: int | None,
    concurrency: int,
    goal: Goal,
    queue_images: bool,
) -> Workload:
    """The workload that keywords mean.

    Raises:
        UsageError: it is none.
    """
    if images < 0 or concurrency < 1 or (context is not None and context < 1):
        raise UsageError(
            f"a workload of {images} images, {concurrency} requests and {context} tokens is none",
            hint="images from 0, concurrency and context from 1",
        )
    return Workload(
        images=images,
        image_size=image_size,
        context=context,
        concurrency=concurrency,
        goal=goal,
        queue_images=queue_images,
    )


def _margin(margin: int | str | None) -> Margin:
    if isinstance(margin, str):
        if not margin.endswith("%"):
            return Margin(bytes=parse_bytes(margin, what="--margin"))
        try:
            return Margin(share=float(margin[:-1]) / 100)
        except ValueError:
            raise UsageError(f"margin {margin!r} is no share", hint="write it as 2%") from None
    return Margin(bytes=margin)


def checked(ask: Ask) -> Ask:
    """Refuse contradictions that no search can mend.

    Raises:
        UsageError: two things that are asked for contradict each other.
    """
    workload, fixed = ask.workload, ask.fixed
    check_limits(ask)
    if workload.context is not None and "session_len" in fixed:
        raise UsageError("context and session_len are one setting", hint="give only one of the two")
    longest = ask.model.text.max_position_embeddings
    if workload.context is not None and workload.context > longest:
        raise UsageError(
            f"{ask.model.name} reads {longest} tokens, not {workload.context}",
            hint=f"--context {longest} at most",
        )
    return ask
