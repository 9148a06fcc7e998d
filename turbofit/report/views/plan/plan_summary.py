"""A plan in about twenty lines: what it serves, one bar, what is promised, the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.messages import plural
from turbofit.core.units import format_bytes, two_digits
from turbofit.report.painters.document import (
    BarPiece,
    FactList,
    Heading,
    Paragraph,
)
from turbofit.report.views.plan.capacity import capacity
from turbofit.report.views.plan.commands_view import commands_in_short
from turbofit.report.views.plan.memory_view import fullest, memory_bar, need_of
from turbofit.report.views.plan.remedies_table import remedies_table
from turbofit.report.views.summary_lines import assumed_of, first_warnings

if TYPE_CHECKING:
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan, Throughput, UsualImage
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
    """The verdict, what was assumed, the promise, the fullest GPU, the command, where is more."""
    blocks: list[Block] = [
        Heading(text=f"{plan.model.name} on {plan.machine.name}"),
        Paragraph(text=plan.verdict, tone="good" if plan.fits else "bad"),
    ]
    # Those of this plan first, then those of the machine.
    said = sorted(plan.warnings, key=lambda text: text in plan.machine.warnings)
    blocks += first_warnings(said, (*plan.model.warnings, *assumed_of(plan.machine)))
    if not plan.fits:
        blocks += remedies_table(plan.remedies[:_REMEDIES])
    blocks.append(FactList(facts=tuple(_promise(plan))))
    blocks += _fullest(plan)
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
    """What speed is to be expected, and what requests are held to."""
    kv, limits, rule = plan.kv, plan.limits, plan.model.image_rule
    facts = []
    if plan.throughput is not None and plan.usual_image:
        usual, (width, height) = plan.usual_image, plan.usual_image.image_size
        for size, at_once, speed in (
            ("worst size", plan.requests_at_once, plan.throughput),
            (f"{width}x{height}", usual.requests_at_once, usual),
        ):
            facts.append((size, f"{at_once:,} at once; forecast {_speed(speed)}"))
    elif plan.throughput is not None:
        facts.append(("forecast", speed_in_short(plan.throughput, plan.model)))
    if kv.tokens:
        facts.append(("KV cache", _cache(plan)))
    facts.append(("context", _context(plan)))
    if limits.vision_unit is not None and rule is not None:
        unit, side = limits.vision_unit, rule.unit_side
        text = (
            f"{limits.images_per_request} a request, at most {limits.units_per_image:,}"
            f" {plural(limits.units_per_image, unit)} of {side}x{side} pixels each:"
            f" {limits.image_tokens_per_request:,}"
            f" {plural(limits.image_tokens_per_request, 'token')}"
        )
        facts.append(("images", text))
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


def _cache(plan: Plan) -> str:
    """What the cache holds: tokens, requests of the workload, the longest requests."""
    kv, users = plan.kv, capacity(plan).users
    shown = dict.fromkeys((users[0], users[-1]))
    held = " or ".join(f"{one.held:,} of {one.tokens:,}" for one in shown)
    return f"{kv.total_tokens:,} tokens of {format_bytes(kv.bytes_per_token)}; requests: {held}"


def speed_in_short(speed: Throughput, model: Model) -> str:
    """The forecast of speed; with its error for models of text, of which alone it was measured."""
    error = speed.median_error
    if error is None or model.vision is not None:
        return _speed(speed)
    return f"{_speed(speed)} (median error {error:.1%})"


def _speed(speed: Throughput | UsualImage) -> str:
    rate, first = speed.requests_per_second, speed.seconds_to_first_token
    return f"{two_digits(rate)} requests/s, {two_digits(first)} s to the first token"
