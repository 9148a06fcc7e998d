"""The plan of a cluster as JSON, and errors of other processes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.support.plans import model, plausible_plan
from turbofit.core.cluster import ClusterPlan, NodePlan
from turbofit.core.errors import LaunchError, TurbofitError, UsageError, error_from
from turbofit.core.plan import Workload


def test_the_plan_of_a_cluster_survives_json() -> None:
    plan = plausible_plan()
    whole = ClusterPlan(
        turbofit_version="0.1.0", created="2026-11-21T08:00:00Z", fits=True, verdict="fits",
        model=model(), workload=Workload(), promise=plan.promise,
        nodes=(
            NodePlan(node="a", name="host-a", address="10.0.0.1", cards="1x L4", plan=plan),
            NodePlan(node="b", name="host-b", address="10.0.0.2", cards="", why_not="no GPU"),
        ),
    )  # fmt: skip
    assert ClusterPlan.from_json(whole.to_json()) == whole
    # Fields that came later may be missing.
    text = replace(whole, source="ray").to_json().replace('"source": "ray"', '"unknown": 1')
    assert ClusterPlan.from_json(text).source == ""


@pytest.mark.parametrize("text", ["", "[]", '{"nodes": []}', '{"source": 1, "nodes": []}'])
def test_what_is_no_plan_of_a_cluster_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="mine cannot be read"):
        ClusterPlan.from_json(text, what="mine")


@pytest.mark.parametrize("kind", TurbofitError.__subclasses__())
def test_an_error_from_another_machine_is_the_same_here(kind: type[TurbofitError]) -> None:
    again = error_from(kind("it\n did not", hint="do this").to_dict()["error"])
    assert type(again) is kind
    assert (again.message, again.hint) == ("it did not", "do this")
    bug = error_from({"message": "a bug in turbofit", "exit_code": 1})
    assert type(bug) is LaunchError
    assert bug.message == "a bug in turbofit"
