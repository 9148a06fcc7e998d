"""Whether the machine is still the one that a plan counted on, just before the launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import DoesNotFitError, MachineError, UsageError
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.launch.serve.leases import open_margin

if TYPE_CHECKING:
    from collections.abc import Collection

    from turbofit.core.machine import Gpu, Machine
    from turbofit.core.plan import Plan

__all__ = ["check_machine", "who_grew"]


def check_machine(plan: Plan, now: Machine, *, fitted: bool = False) -> None:
    """Compare a plan's GPUs with what is there; links and names of the rest do not matter.

    Less free memory is accepted only as far as the plan leaves more than its margin.

    Args:
        plan: what will be launched.
        now: the machine.
        fitted: each start takes the plan's cache whatever is free (`launch.engine.fitted_cache`),
            so that others may have what a budget withholds from the plan.

    Raises:
        UsageError: the plan was not made for a real machine.
        MachineError: a GPU of the plan is not there, or cannot be read.
        DoesNotFitError: somebody took memory that the plan counted on.
    """
    if plan.machine.source == "preset":
        raise UsageError(
            f"the plan was made for {plan.machine.name}, which is a preset and no machine",
            hint="plan on the machine itself: turbofit serve MODEL, or turbofit plan without --on",
        )
    present = {gpu.uuid: gpu for gpu in now.gpus}
    for ledger in plan.gpus:
        gpu = present.get(ledger.uuid)
        if gpu is None:
            raise MachineError(
                f"GPU {ledger.index} of the plan ({ledger.name}, {ledger.uuid}) is not there",
                hint="plan again on this machine: turbofit serve MODEL",
            )
        if gpu.free == NA:
            raise MachineError(
                f"the free memory of GPU {gpu.index} cannot be read",
                hint="see turbofit machine; another driver version may tell",
            )
        missing = ledger.free - gpu.free
        margin = open_margin(ledger) if fitted else ledger.margin
        spare = max(0, ledger.headroom - margin)
        if missing > spare:
            raise DoesNotFitError(
                f"GPU {gpu.index} has {format_bytes(missing)} less free memory than the plan "
                f"counted on: {who_grew(plan.machine.gpu(ledger.index), gpu, missing)}",
                hint="stop that process, or plan again: turbofit serve MODEL",
            )


def who_grew(then: Gpu, now: Gpu, missing: int, ours: Collection[int] = ()) -> str:
    """Who took it: processes that are new or have grown, largest first; none of ours."""
    before = {holder.pid: holder.bytes for holder in then.holders}
    grown: list[tuple[int, str]] = []
    for holder in now.holders:
        if holder.bytes == NA or holder.pid in ours:
            continue
        had = before.get(holder.pid, 0)
        more = holder.bytes - (0 if had == NA else had)
        if more > 0:
            who = holder.name if holder.pid == NA else f"{holder.name}[{holder.pid}]"
            grown.append((more, f"{who} took {format_bytes(more)} on GPU {now.index}"))
    if not grown:
        return f"nobody visible took {format_bytes(missing)} on GPU {now.index}"
    return ", ".join(text for _, text in sorted(grown, reverse=True)[:3])
