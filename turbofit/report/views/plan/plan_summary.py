"""A plan in about twenty lines: what it serves, one bar, what is promised, the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.messages import plural
from turbofit.core.units import format_bytes, three_digits
from turbofit.report.painters.document import (
    BarPiece,
    FactList,
    Heading,
    Paragraph,
)
from turbofit.report.views.plan.commands_view import commands_in_short
from turbofit.report.views.plan.memory_view import fullest, memory_bar, need_of
from turbofit.report.views.plan.remedies_table import remedies_table
from turbofit.report.views.summary_lines import assumed_of, first_warnings

if TYPE_CHECKING:
    from turbofit.core.plan import Plan, Throughput
    from turbofit.report.painters.document import Block

__all__ = ["plan_summary", "speed_in_short"]

#: Pieces of the whole text's bar that are one here: their letters, the letter and name of all.
_PIECES: Final = (
    ("o", "o", "held by others"),
    ("rc", "c", "driver, CUDA"),
    ("W", "W", "weights"),
    ("K", "K", "KV cache"),
    ("b", "b", "buffers"),
    ("t", "t", "worst request"),
    ("l", "l", "loading"),
    (".m", ".", "free"),
)
#: Remedies that are shown; the whole text has all.
_REMEDIES: Final = 3
_FULL: Final = "more: --full, --md or --json; as a page: turbofit report latest --html FILE"


def plan_summary(plan: Plan) -> list[Block]:
    """The verdict, the fullest GPU, the promise, warnings, the command, and where there is more."""
    blocks: list[Block] = [
        Heading(text=f"{plan.model.name} on {plan.machine.name}"),
        Paragraph(text=plan.verdict, tone="good" if plan.fits else "bad"),
    ]
    if not plan.fits:
        blocks += remedies_table(plan.remedies[:_REMEDIES])
    blocks += _fullest(plan)
    blocks.append(FactList(facts=tuple(_promise(plan))))
    # Those of this plan first, then those of the machine.
    said = sorted(plan.warnings, key=lambda text: text in plan.machine.warnings)
    blocks += first_warnings(said, (*plan.model.warnings, *assumed_of(plan.machine)))
    if plan.fits:
        blocks += commands_in_short(plan)
    return [*blocks, Paragraph(text=_FULL, tone="dim")]


def _fullest(plan: Plan) -> list[Block]:
    """The bar of the GPU that has the least left."""
    if not plan.gpus:
        return []
    title, ledger = fullest(plan.gpus)
    need, when = need_of(ledger)
    bar = memory_bar(ledger, f"{title}: {need} of {format_bytes(ledger.total)} in use {when}")
    sizes = {piece.mark: piece.bytes for piece in bar.parts}
    parts = tuple(
        BarPiece(mark=mark, name=name, bytes=sum(sizes.get(one, 0) for one in marks))
        for marks, mark, name in _PIECES
    )
    return [replace(bar, parts=tuple(piece for piece in parts if piece.bytes))]


def _promise(plan: Plan) -> list[tuple[str, str]]:
    """What requests are held to, and what speed is to be expected."""
    kv, limits, rule = plan.kv, plan.limits, plan.model.image_rule
    facts = []
    if kv.tokens:
        size = format_bytes(kv.bytes_per_token)
        facts.append(("KV token", f"keys and values of one token, text or image: {size} of cache"))
    facts.append(("context", _context(plan)))
    if limits.vision_unit is not None and rule is not None:
        unit, side = limits.vision_unit, rule.unit_side
        text = (
            f"{limits.images_per_request} a request, at most {limits.units_per_image:,}"
            f" {plural(limits.units_per_image, unit)} of {side} x {side} pixels each:"
            f" {limits.image_tokens_per_request:,}"
            f" {plural(limits.image_tokens_per_request, 'token')}"
        )
        facts.append(("images", text))
    if plan.throughput is not None:
        facts.append(("speed", speed_in_short(plan.throughput)))
    if plan.fits and plan.remedies:
        facts.append(("faster", f"{plan.remedies[0].change}: {plan.remedies[0].effect}"))
    if plan.rehearsal is not None:
        told = f"{plan.rehearsal.outcome} with LMDeploy {plan.rehearsal.engine_version}"
        facts.append(("rehearsal", f"{told} on pretend GPUs"))
    return facts


def _context(plan: Plan) -> str:
    """Prefill is explained where the command's option is read next."""
    settings = plan.settings
    if not plan.engine.of_lmdeploy:
        return f"{settings.session_len:,} tokens with the answer"
    return (
        f"{settings.session_len:,} tokens with the answer; prefill reads"
        f" {settings.max_prefill_token_num:,} at a time"
    )


def speed_in_short(speed: Throughput) -> str:
    """The forecast of speed with its error."""
    error = (
        ""
        if speed.median_error is None
        else (f" (median error {speed.median_error:.1%}, text models)")
    )
    return f"{three_digits(speed.requests_per_second)} requests/s by the forecast{error}"
