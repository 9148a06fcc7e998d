"""One engine of a node's plan as a plan of its own: what a Ray actor launches and holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["alone"]


def alone(plan: Plan, group: int) -> Plan:
    """The plan of one group, as if the node had no other: its number in it is 0.

    Host memory is the group's even part, rounded up: over, never under, where groups differ little.

    Args:
        plan: of a node.
        group: which of its groups.
    """
    group_plan, members = plan.of_group(group), plan.parallel.groups[group]
    count = len(plan.parallel.groups)
    command = next((one for one in plan.commands if one.group == group), None)
    return replace(
        group_plan,
        machine=replace(plan.machine, visible=members),
        parallel=replace(group_plan.parallel, tp=len(members), replicas=1, groups=(members,)),
        kv=replace(group_plan.kv, total_tokens=group_plan.kv.tokens),
        gpus=tuple(gpu for gpu in group_plan.gpus if gpu.index in members),
        host=replace(
            group_plan.host,
            pinned=-(-group_plan.host.pinned // count),
            pageable=-(-group_plan.host.pageable // count),
        ),
        throughput=None,
        considered=(),
        remedies=(),
        commands=() if command is None else (replace(command, group=0),),
        by_group=(),
    )
