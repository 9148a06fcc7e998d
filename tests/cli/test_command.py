"""Commands have an option for each field of their requests; any words are options or wrong use."""

from __future__ import annotations

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbofit.cli.command import CliCommand
from turbofit.cli.main import TURBOFIT
from turbofit.cli.options.common_options import (
    FORMS,
    machine_options,
    planning_keywords,
    planning_options,
)
from turbofit.core.errors import UsageError
from turbofit.planning.request import PlanRequest, PredictRequest

Out = pytest.CaptureFixture[str]


def test_every_field_of_a_request_has_an_option() -> None:
    for name, kind in (("plan", PlanRequest), ("predict", PredictRequest)):
        command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
        assert command is not None
        names = {{"async": "async_"}.get(one.name, one.name) for one in command.params}
        assert names - set(kind.model_fields) <= {
            "cluster", "file", "rehearse", "full", "as_json", "md", "quiet", "verbose",
            "help",
        }  # fmt: skip
        assert set(kind.model_fields) <= names


WORDS = """--tp 1 0 -1 1e9 --margin 3% nan% -5% 1GiB --image-size 1x1 9x --gpus , --context
--json --on --quant-policy int4 x --cache-max-entry-count nan inf 0.5 --budget é --async --goal"""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS.split()), max_size=6))
def test_any_words_are_options_or_wrong_use(given_words: list[str]) -> None:
    reader = CliCommand(lambda **_: 0, [*machine_options(), *planning_options(), *FORMS])
    hint = "none"
    try:
        with reader.make_context("plan", list(given_words)) as ctx:
            assert all(value == value for value in planning_keywords(ctx.params).values())
    except UsageError as exc:
        hint = exc.hint
    except click.exceptions.Exit:
        hint = "help"
    assert hint
