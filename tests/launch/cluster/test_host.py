"""An engine's order: the environment it is started in, and the promise it keeps when it is not."""

from __future__ import annotations

import os

import pytest
from msgspec.structs import replace

from tests.launch.cluster.test_promise import config, planned
from turbofit.core.errors import DoesNotFitError
from turbofit.core.plan import Plan
from turbofit.launch.cluster import host as module
from turbofit.launch.cluster.forward import Forwarder
from turbofit.launch.cluster.host import HostedEngine, prepare_environment
from turbofit.launch.cluster.promise import engine_specs_of


@pytest.fixture(scope="module")
def hosted() -> HostedEngine:
    """Made, and not started."""
    plan = planned("2xrtx3090", tp=2)
    (engine_spec,) = engine_specs_of(plan.nodes[0], plan, config(), here=False, peers=("10.0.0.9",))
    return HostedEngine(engine_spec)


def test_an_engine_sees_its_cards_and_no_cluster(
    hosted: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray shows its actor one GPU; LMDeploy would join the cluster and wait there for ever."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(
        {"CUDA_VISIBLE_DEVICES": "1", "RAY_JOB_ID": "7", "RAY_ADDRESS": "x", "RAY_USE_TLS": "1"}
    )
    prepare_environment(hosted._engine_spec.plan)
    assert os.environ["CUDA_VISIBLE_DEVICES"].count(",") == 1
    assert os.environ["RAY_ADDRESS"] == "local"
    assert os.environ["RAY_USE_TLS"] == "1"
    assert "RAY_JOB_ID" not in os.environ


def test_a_plan_after_a_lack_of_memory_keeps_the_promise(hosted: HostedEngine) -> None:
    """Less cache is fine, a shorter request is not."""
    plan = hosted._engine_spec.plan
    kept = hosted._kept(replace(plan, kv=replace(plan.kv, tokens=plan.kv.tokens // 2)))
    assert kept.limits == plan.limits
    shorter = replace(plan.kv, longest_request_tokens=plan.kv.longest_request_tokens - 1)
    with pytest.raises(DoesNotFitError, match="are promised"):
        hosted._kept(replace(plan, kv=shorter))
    smaller = replace(plan.limits, units_per_image=plan.limits.units_per_image - 1)
    with pytest.raises(DoesNotFitError, match="units_per_image would be"):
        hosted._kept(replace(plan, limits=smaller))


def test_news_come_once(hosted: HostedEngine) -> None:
    """`follow` waits for what is newer than what was told."""
    hosted._say("warning: it is warm")
    first = hosted.follow(0, 1)
    assert first.said == "warning: it is warm"
    assert first.warnings == ("it is warm",)
    assert hosted.follow(first.number, 0.05) == first


def test_a_gateway_that_comes_while_the_port_opens_is_let_in(
    hosted: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actor is told of it in another thread, and once."""

    class Opening(Forwarder):
        def start(self) -> None:
            super().start()
            opened.allow(("10.0.0.9", "10.0.0.8"))

    monkeypatch.setattr(module, "Forwarder", Opening)
    opened = HostedEngine(replace(hosted._engine_spec, listen="127.0.0.1"))
    opened.open(hosted._engine_spec.plan, ["http://127.0.0.1:1"])
    try:
        assert opened._forwarder is not None
        assert opened._forwarder.admits("10.0.0.8")
        assert opened._forwarder.admits("10.0.0.9")
    finally:
        opened.close()


class Planning:
    """A planner that says what it was asked."""

    def __init__(self, plan: Plan, *, changed: bool = False) -> None:
        self.plan, self.changed = plan, changed
        self.calls: list[str] = []

    def take(self, plan: Plan) -> None:
        self.calls.append("take")
        if self.changed:
            raise DoesNotFitError("somebody took memory", hint="")

    def make(self, changes: dict[str, object]) -> Plan:
        self.calls.append("make")
        return self.plan


@pytest.mark.parametrize(
    ("rehearse", "changed", "calls"),
    [(False, False, ["take"]), (False, True, ["take", "make"]), (True, False, ["make"])],
)
def test_the_node_plans_once_more_where_it_must(
    hosted: HostedEngine, rehearse: bool, changed: bool, calls: list[str]
) -> None:
    """To rehearse, or since somebody took memory meanwhile."""
    config = hosted._engine_spec.config.changed(rehearse=rehearse)
    engine_spec = replace(hosted._engine_spec, config=config)
    planner = Planning(engine_spec.plan, changed=changed)
    assert HostedEngine(engine_spec)._settled(planner) == engine_spec.plan  # type: ignore[arg-type]
    assert planner.calls == calls


def test_nothing_fits_any_more(hosted: HostedEngine) -> None:
    """Said, and not launched."""
    planner = Planning(replace(hosted._engine_spec.plan, fits=False), changed=True)
    with pytest.raises(DoesNotFitError):
        HostedEngine(hosted._engine_spec)._settled(planner)  # type: ignore[arg-type]
