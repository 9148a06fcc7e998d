"""Whether the parts of a plan from a file agree, as reports, the gateway and a launch rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.plan import Plan, Rehearsal

__all__ = ["check_consistent"]


def check_consistent(plan: Plan, what: str) -> None:
    """Refuse a plan whose parts contradict each other.

    Args:
        plan: as it was read.
        what: how the message names it.

    Raises:
        UsageError: with the first contradiction.
    """
    wrong = next(_wrong(plan), None)
    if wrong is not None:
        raise UsageError(
            f"{what} cannot be read: {wrong}",
            hint="was it edited by hand? plan again, and change settings by options instead",
        )


def _wrong(plan: Plan) -> Iterator[str]:
    groups, block = plan.parallel.groups, plan.settings.cache_block_seq_len
    ledgers = {gpu.index for gpu in plan.gpus}
    machine = {gpu.index for gpu in plan.machine.gpus}
    used = {index for group in groups for index in group}
    if not groups or not all(groups):
        yield "it has no group of GPUs"
    if used != ledgers:
        yield f"its groups are of GPUs {sorted(used)}, its ledgers of {sorted(ledgers)}"
    if not used <= machine:
        yield f"its groups are of GPUs {sorted(used)}, its machine has {sorted(machine)}"
    if plan.parallel.replicas != len(groups):
        yield f"it has {plan.parallel.replicas} replicas in {len(groups)} groups"
    if len(plan.by_group) not in (0, len(groups)):
        yield f"{len(plan.by_group)} of its {len(groups)} groups have settings of their own"
    if any(gpu.total <= 0 for gpu in plan.gpus):
        yield "a GPU has no memory"
    if block < 1:
        yield f"cache_block_seq_len is {block}"
    if min(plan.kv.tokens, plan.kv.longest_request_tokens) < 0:
        yield "its cache holds less than no tokens"
    yield from _rehearsals(plan)


def _rehearsals(plan: Plan) -> Iterator[str]:
    """The first group's; of groups that differ each one's, and the plan's is one of these."""
    rehearsals = [one.rehearsal for one in plan.by_group]
    if not rehearsals:
        rehearsals = [plan.rehearsal]
    elif plan.rehearsal is not None and plan.rehearsal not in rehearsals:
        yield "its rehearsal is none of its groups'"
    for rehearsal, group in zip(rehearsals, plan.parallel.groups, strict=False):
        if rehearsal is not None:
            yield from _rehearsed(rehearsal, len(group))


def _rehearsed(rehearsal: Rehearsal, cards: int) -> Iterator[str]:
    """A rehearsal tells of each GPU of its group."""
    counts = [
        (one.phase, len(cells)) for one in rehearsal.timeline for cells in (one.peak, one.end)
    ]
    counts += [("cache", len(cells)) for cells in (rehearsal.cache.free, rehearsal.cache.region)]
    for name, count in counts:
        if count != cards:
            yield f"its rehearsal tells of {count} GPUs in {name}, not of {cards}"
