"""The contract's types inside other people's pydantic models."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from tests.support.plans import plausible_plan
from turbofit.core.plan import Plan


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


def test_its_json_schema_needs_no_other_document() -> None:
    schema = Answer.model_json_schema()
    plan = schema["properties"]["plan"]
    assert plan["title"] == "Plan"
    assert plan["properties"]["kv"]["properties"]["tokens"] == {
        "description": "Tokens of one group; of the smallest where they differ.",
        "type": "integer",
    }
    assert "$ref" not in json.dumps(plan)
