"""The published schemas describe what turbofit really prints, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from scripts.schemas import document
from tests.fixtures.clusters import cluster
from tests.report.documents import KINDS, planned, served_run
from tests.support.plans import plausible_plan
from tests.sweep import sweep
from turbofit import api
from turbofit.cli.main import main
from turbofit.core.cluster import NodeStatus
from turbofit.core.errors import TurbofitError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import to_json
from turbofit.report.schema import NAMES, schema_path, schema_text
from turbofit.report.stored_documents import StoredPlan, check_consistent, saved_document

pytestmark = pytest.mark.slow
SCHEMAS: dict[str, Any] = {name: json.loads(schema_text(name)) for name in NAMES}
REGISTRY: Any = Registry().with_resources(
    (schema["$id"], Resource.from_contents(schema)) for schema in SCHEMAS.values()
)


def check(name: str, text: str) -> None:
    Draft202012Validator(SCHEMAS[name], registry=REGISTRY).validate(json.loads(text))


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name] == json.loads(json.dumps(document(name)))
    assert main(["report", "--schema", name]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMAS[name]


@pytest.mark.parametrize("kind", [*KINDS, "served", "died"])
def test_plans_predictions_and_rehearsals(kind: str) -> None:
    check("plan", planned(kind).to_json())
    check_consistent(planned(kind), kind)


@pytest.mark.parametrize("name", sweep(load_yaml(preset_path("models", "aliases")), 16))
def test_a_plan_and_a_prediction_of_every_model(name: str) -> None:
    try:
        plan = api.plan(name, on="2xrtx4090,p2p=none,ram=256GiB")
    except TurbofitError:
        pytest.skip(f"{name} has no account")
    check("plan", plan.to_json())
    check_consistent(plan, name)
    try:
        check("plan", api.predict(name, on="1xl4:free=19GiB").to_json())
    except TurbofitError:
        return  # Transformers is planned for, never predicted


def test_a_run() -> None:
    plan = planned("fits")
    for pretend in (False, True):
        run = served_run(plan, pretend=pretend)
        check("report", to_json(saved_document(StoredPlan(plan, run, "run"))))


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("promise",),
        ("engines", 0),
        ("engines", 0, "ledgers", 0, "terms", 0),
        ("engines", 0, "settings"),
    ],
)
def test_a_field_that_nobody_described_fails(place: tuple[Any, ...]) -> None:
    document = json.loads(plausible_plan().to_json())
    at = document
    for step in place:
        at = at[step]
    at["new_field"] = 1
    with pytest.raises(ValidationError, match="new_field"):
        check("plan", json.dumps(document))


@pytest.mark.parametrize(
    ("model", "specs"),
    [
        ("internvl2-8b", ("4xrtx3090", "2xrtx2080ti", "1xt4")),
        ("internvl2-76b", ("4xrtx3090",) * 4),
        ("internvl2-8b", ("1xt4",)),
        ("llava-onevision-7b", ("1xa100",)),
    ],
)
def test_plans(model: str, specs: tuple[str, ...]) -> None:
    check("cluster-plan", api.plan_cluster(model, cluster(*specs)).to_json())


def test_what_a_node_of_a_cluster_does() -> None:
    status = NodeStatus(
        serves="m", id="a", name="a", address="10.0.0.1", state="unfit", why_not="no GPU"
    )
    check("cluster-status", to_json(status))
    assert schema_path("cluster-status").name == f"{status.schema.replace('/', '-')}.json"
