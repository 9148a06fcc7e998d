"""The plan's row on the engine that turbofit chooses itself, TurboMind or the PyTorch one."""

from __future__ import annotations

from pathlib import Path

from bench.peers.grid import PLAN, SETTINGS, Pair
from bench.peers.host import Peak
from bench.peers.row import Fate, Row
from bench.peers.turbomind import served_plan, turbomind_row
from bench.peers.workload import lowered
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan, Rehearsal
from turbofit.core.units import format_bytes
from turbofit.rehearse.confirm import rehearse_plan


def plan_row(pair: Pair, folder: Path) -> Row:
    """Plans, starts the engine on pretend cards, and sends it the worst that its plan admits."""
    try:
        plan = served_plan(pair)
    except TurbofitError as error:
        return Row(pair.name, PLAN, "", None, "refused", error.message, 0, None, None)
    if plan.engine.name == "turbomind":
        return turbomind_row(pair, SETTINGS[0], folder)
    if not plan.fits:
        return Row(pair.name, PLAN, "", None, "refused", plan.verdict, 0, None, None)
    if plan.engine.name == "pytorch":
        return _pytorch(pair, plan)
    told = f"planned for {plan.engine.name}, whose plans are not rehearsed"
    return Row(pair.name, PLAN, "", plan.kv.tokens, "stalled", told, 0, None, None)


def _pytorch(pair: Pair, plan: Plan) -> Row:
    """LMDeploy's PyTorch engine with the cases of turbofit's own rehearsal."""
    try:
        with Peak() as peak:
            seen = rehearse_plan(plan).rehearsal
    except TurbofitError as error:
        return Row(pair.name, PLAN, "", plan.kv.tokens, "stalled", error.message, 0, None, None)
    assert seen is not None
    fate, of = _fate(seen)
    settings = plan.settings
    return Row(
        pair=pair.name,
        who=PLAN,
        settings=(
            f"{settings.cache_max_entry_count:g} / {settings.max_batch_size}"
            f" / {settings.max_prefill_token_num}"
        ),
        tokens=seen.cache.tokens,
        fate=fate,
        of=of,
        host=peak.bytes,
        pinned=None,
        ready=None,
        note=", ".join(t for t in ("PyTorch engine", lowered(plan)) if t),
    )


def _fate(seen: Rehearsal) -> tuple[Fate, str]:
    death = seen.death
    if seen.outcome == "served":
        return "survived", ""
    if seen.outcome != "out_of_memory" or death is None:
        return "stalled", seen.outcome if death is None else f"{death.phase}: {death.where}"
    of = f"{death.phase}: {death.where}"
    if death.asked is not None and death.left is not None:
        of += f", {format_bytes(death.asked)} asked, {format_bytes(death.left)} left"
    return ("died" if death.phase.startswith("case") else "refused"), of
