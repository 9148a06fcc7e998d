"""A plan as JSON, and as a field of other people's models."""

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


def test_a_plan_is_a_field_that_survives_json() -> None:
    answer = Answer(plan=plausible_plan(), note="x")
    document = json.loads(answer.model_dump_json())
    assert document["plan"] == json.loads(answer.plan.to_json())
    assert Answer.model_validate_json(json.dumps(document)) == answer
    document["plan"]["engines"][0]["kv"]["tokens"] = "many"
    with pytest.raises(
        ValidationError, match=r"Expected `int`, got `str` - at `\$.engines\[0\].kv.tokens`"
    ):
        Answer.model_validate(document)
    for mode in ("validation", "serialization"):
        assert Answer.model_json_schema(mode=mode)["properties"]["plan"] == {"title": "Plan"}
