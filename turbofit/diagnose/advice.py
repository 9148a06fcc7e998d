"""What would have worked: turbofit's plan for the model and machine of a log."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Remedy
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.answer import Advice
from turbofit.diagnose.case import spec_with_used, usable
from turbofit.machine.source import machine_from
from turbofit.model.presets import awq_variant

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.diagnose.case import Case
    from turbofit.diagnose.draft import Draft

__all__ = ["advice"]

_SHOWN: Final = ("tp", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
                 "session_len", "dtype", "quant_policy", "communicator")  # fmt: skip
#: Beside the weights of a 16-bit model on one card: context, KV and activations of one request.
_ROOM: Final = 2 * GIB


def advice(case: Case, draft: Draft) -> Advice | None:
    """The plan, or how far the weights alone go; None where model or machine is not known."""
    if case.machine is None or case.on is None:
        return None
    if case.model is None:
        return _by_weights(case, draft)
    spec = spec_with_used(case.on, draft.others) if draft.others else case.on
    machine = machine_from(spec)
    try:
        plan = case.tools.plan(case.model, on=machine)
        if not plan.fits and draft.others:
            alone = case.tools.plan(case.model, on=case.machine)
            if alone.fits:
                return _planned(case, alone, case.on, f"once the cards are free: {alone.verdict}")
    except TurbofitError as exc:
        return Advice(
            model=case.model.name, on=spec, fits=None, verdict=f"{exc.message} ({exc.hint})"
        )
    return _planned(case, plan, spec, plan.verdict)


def _planned(case: Case, plan: Plan, spec: str, verdict: str) -> Advice:
    settings = plan.settings
    values: dict[str, object] = {"engine": plan.engine.name}
    values |= {name: getattr(settings, name) for name in _SHOWN}
    if plan.engine.name != "turbomind":
        del values["communicator"]
    values["replicas"] = plan.parallel.replicas
    limits = plan.limits
    for name in ("max_dynamic_patch", "max_pixels_per_image"):
        if getattr(limits, name) is not None:
            values[name] = getattr(limits, name)
    assert case.model is not None
    name = case.model.hub_id or case.model.name
    return Advice(
        model=plan.model.name,
        on=spec,
        fits=plan.fits,
        verdict=verdict,
        settings=values if plan.fits else {},
        command=shlex.join(["turbofit", "serve", name]) if plan.fits else "",
        remedies=plan.remedies or _smaller(case),
    )


def _smaller(case: Case) -> tuple[Remedy, ...]:
    """The AWQ variant by name, where one is published."""
    assert case.model is not None
    try:
        variant = awq_variant(case.model)
    except TurbofitError:
        return ()
    if variant is None:
        return ()
    saved = case.model.weight_bytes - variant.weight_bytes
    return (
        Remedy(
            change=f"{variant.hub_id or variant.name} instead",
            effect=f"{format_bytes(saved)} less of weights, which the cache gets",
        ),
    )


def _by_weights(case: Case, draft: Draft) -> Advice | None:
    """Models without an account: on how many of the cards the weights fit at 16 bits."""
    model, machine = case.unplanned, case.machine
    if model is None or machine is None or case.on is None:
        return None
    found = [usable(machine.gpu(index)) for index in machine.visible]
    sizes = [size for size in found if size is not None]
    if not sizes:
        return None
    weights, card, count = model.weight_bytes, min(sizes), len(sizes)
    need, shape = _shape(weights, card, count)
    verdict = (
        f"{model.name} has {format_bytes(weights)} of weights at 16 bits, a card here has"
        f" {format_bytes(card)}: {shape}"
    )
    if draft.others:
        beside, then = _shape(weights, card - draft.others, count)
        verdict += f"; beside the {format_bytes(draft.others)} that others hold: {then}"
        need = beside or need
        if beside is None:
            verdict += "; so end what holds the card"
    return Advice(
        model=model.name,
        on=case.on,
        fits=need is not None,
        verdict=verdict,
        settings={"dtype": "float16 or bfloat16", "cards": need} if need else {},
        remedies=(
            Remedy(change=f"run it with {model.engine}", effect=f"its size: {model.source}"),
        ),
    )


def _shape(weights: int, card: int, count: int) -> tuple[int | None, str]:
    """How many of the cards one model needs, and that in words."""
    need = next((n for n in range(1, count + 1) if weights / n + _ROOM <= card), None)
    if need is None:
        return (
            None,
            f"it does not fit on {count} such card(s), but 8- or 4-bit weights may",
        )
    left = f"{format_bytes(int(card - weights / need))} stay for cache, activations and context"
    if need == 1:
        where = "one card holds it, so a whole model on each card and no sharding"
        return 1, f"{where if count > 1 else 'the card holds it'}; {left} on each"
    where = f"no card holds it whole; sharded over {need} it fits, as one model and not as replicas"
    return need, f"{where}; {left} on each"
