"""One engine of a node's plan as a plan of its own."""

from __future__ import annotations

from turbofit import api
from turbofit.launch.cluster.alone import alone


def test_equal_engines() -> None:
    """Its own cards, one engine, an even part of the host's memory."""
    plan = api.plan("internvl2-2b", on="4xrtx3090", tp=2)
    assert len(plan.parallel.groups) == 2
    for group, members in enumerate(plan.parallel.groups):
        one = alone(plan, group)
        assert one.parallel.groups == (members,)
        assert (one.parallel.tp, one.parallel.replicas) == (2, 1)
        assert tuple(gpu.index for gpu in one.gpus) == members == one.machine.visible
        assert one.settings == plan.settings
        assert one.kv.total_tokens == plan.kv.tokens
        assert 2 * one.host.pinned >= plan.host.pinned
        (command,) = one.commands
        assert command.group == 0
        assert command.argv == plan.commands[group].argv
        assert command.env == plan.commands[group].env
        assert one.limits == plan.limits


def test_unequal_engines() -> None:
    """With the settings of its group, and no longer a plan of several."""
    plan = api.plan("internvl2-8b", on="rtx3090+a100-80g", tp=1)
    assert len(plan.by_group) == 2
    for group, group_plan in enumerate(plan.by_group):
        one = alone(plan, group)
        assert one.by_group == ()
        assert (one.settings, one.kv.tokens) == (group_plan.settings, group_plan.kv.tokens)
        assert one.limits.units_per_forward == group_plan.units_per_forward
        assert len(one.gpus) == 1
