"""`bench/peers`: what a plan holds beside what LMDeploy's own settings hold."""

from __future__ import annotations

import pytest

from turbofit.core.units import MIB


def test_the_bar_is_the_surviving_peer_that_holds_most() -> None:
    from bench.peers.engine import Row
    from bench.peers.run import summary, verdict, verdict_table

    ours = Row("m 1xl4", "turbofit's plan", "0.8 / 8 / 4096", 100, "survived", "")
    dead = ours._replace(who="LMDeploy's defaults", tokens=200, fate="died")
    less = ours._replace(who="advice: 0.5", tokens=80)
    assert verdict([ours, dead, less]).met
    assert "| m 1xl4 | 100 | advice: 0.5 | 80 | +25.0% | met |" in verdict_table([ours, dead, less])
    more = less._replace(tokens=120)
    assert "missed: m 1xl4" in summary([ours, dead, more])


@pytest.mark.parametrize(
    "pair",
    [
        "llama-2-7b 1xrtx4060ti-16g",
        "llama-2-7b 1xrtx4070tisuper",
        "llama-2-7b 1xrtx4080",
        "llama-2-7b 1xrtx4080super",
        "internvl2-8b 1xrtx3090",
        "qwen2-vl-7b 1xa100-40g",
        "qwen3-8b 1xl4",
        "internvl3-2b 1xrtx3080-12g",
    ],
)
def test_a_plan_that_leaves_what_a_peer_leaves_holds_as_many_tokens(pair: str) -> None:
    import turbofit
    from bench.peers.engine import PLAN, SETTINGS, Pair
    from bench.peers.every import at_its_room, of_peer

    one = Pair(*pair.split())
    plan = turbofit.plan(one.model, on=one.on, tp=1, replicas=1, goal="context")
    peers = [setting.changed or {} for setting in SETTINGS if setting.name != PLAN]
    for peer in (of_peer(one, changed, plan) for changed in peers):
        # A peer that leaves less than nothing dies by the account, but for what that is over.
        if peer.gpus[0].headroom > -8 * MIB:
            assert at_its_room(one, peer) >= peer.kv.tokens


def test_a_plan_that_queues_images_is_sent_what_its_gateway_lets_through() -> None:
    import turbofit
    from bench.peers.workload import requests_of

    options = {"engine": "turbomind", "goal": "context", "max_batch_size": 8}
    plan = turbofit.plan("internvl2-2b", on="1xl4:free=19GiB", **options)
    units = {}
    for gateway in (False, True):
        cases = {case.name: case for case in requests_of(plan, gateway=gateway)}
        queued = cases["images that meet"].requests
        units[gateway] = sum(each for one in queued for each in one.units)
    assert units[True] <= plan.limits.units_per_forward < units[False]


def test_cards_that_differ_in_their_context_are_rehearsed_apart() -> None:
    import turbofit
    from bench.peers.every import alike

    cards = ("rtx4070tisuper", "rtx4080")
    first, second = (turbofit.predict("llama-2-7b", on=f"1x{card}", tp=1) for card in cards)
    assert first.machine.gpus[0].total == second.machine.gpus[0].total
    assert alike(first) != alike(second)
