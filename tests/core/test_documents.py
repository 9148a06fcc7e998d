"""Documents: clusters and plans as JSON, inside other people's models, and errors."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from msgspec.structs import replace
from pydantic import BaseModel, ValidationError

from tests.support.plans import machine, model, plausible_plan
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import LaunchError, TurbofitError, UsageError, error_from
from turbofit.core.plan import Plan, Workload


def plan() -> ClusterPlan:
    node_plan = plausible_plan()
    return ClusterPlan(
        turbofit_version="0.1.0",
        created="2026-11-21T08:00:00Z",
        fits=True,
        verdict="fits",
        model=model(),
        workload=Workload(),
        limits=node_plan.limits,
        longest_request_tokens=node_plan.kv.longest_request_tokens,
        total_tokens=node_plan.kv.total_tokens,
        engines=2,
        nodes=(
            NodePlan(node="a", name="host-a", address="10.0.0.1", plan=node_plan, at_once=8.0),
            NodePlan(node="b", name="host-b", address="10.0.0.2", why_not="no GPU"),
        ),
    )


def test_a_cluster_survives_json() -> None:
    cluster = Cluster(
        source="ray 10.0.0.1:6379",
        nodes=(
            Node(id="a", name="host-a", address="10.0.0.1", machine=machine(), pretend=True),
            Node(id="b", name="host-b", address="10.0.0.2", why_not="no NVML"),
        ),
    )
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_a_plan_survives_json_and_finds_its_nodes() -> None:
    whole = plan()
    assert ClusterPlan.from_json(whole.to_json()) == whole
    node = whole.node("b")
    assert node is not None
    assert node.why_not == "no GPU"
    assert whole.node("z") is None


@pytest.mark.parametrize("text", ["", "[]", '{"nodes": []}', '{"source": 1, "nodes": []}'])
def test_what_is_no_cluster_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cluster cannot be read"):
        Cluster.from_json(text)
    with pytest.raises(UsageError, match="mine cannot be read"):
        ClusterPlan.from_json(text, what="mine")


def test_fields_that_came_later_may_be_missing() -> None:
    old = replace(plan(), source="ray")
    text = old.to_json().replace('"source": "ray"', '"unknown": 1')
    assert ClusterPlan.from_json(text).source == ""


@pytest.mark.parametrize("kind", TurbofitError.__subclasses__())
def test_an_error_from_another_machine_is_the_same_here(kind: type[TurbofitError]) -> None:
    error = kind("it\n did not", hint="do this")
    again = error_from(error.to_dict()["error"])
    assert type(again) is kind
    assert (again.message, again.hint) == ("it did not", "do this")


def test_one_of_no_kind_is_of_the_launch() -> None:
    again = error_from({"message": "a bug in turbofit", "exit_code": 1})
    assert type(again) is LaunchError
    assert again.message == "a bug in turbofit"


class Answer(BaseModel):
    """What somebody's FastAPI app returns."""

    plan: Plan
    note: str = ""


def test_a_plan_is_a_field_as_it_is() -> None:
    plan = plausible_plan()
    assert Answer(plan=plan).plan is plan


def test_it_survives_json() -> None:
    answer = Answer(plan=plausible_plan(), note="x")
    text = answer.model_dump_json()
    assert json.loads(text)["plan"] == json.loads(answer.plan.to_json())
    assert Answer.model_validate_json(text) == answer


def test_what_is_no_plan_is_refused_with_its_field() -> None:
    document = json.loads(plausible_plan().to_json())
    document["kv"]["tokens"] = "many"
    with pytest.raises(ValidationError, match=r"Expected `int`, got `str` - at `\$.kv.tokens`"):
        Answer.model_validate({"plan": document})


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_a_model_that_has_one_has_a_json_schema(
    mode: Literal["validation", "serialization"],
) -> None:
    schema = Answer.model_json_schema(mode=mode)
    assert schema["properties"]["plan"] == {"title": "Plan"}
