from __future__ import annotations

import click
import pytest

from turbofit.cli.command_group import TURBOFIT
from turbofit.cli.options.fields import filled
from turbofit.core.errors import UsageError
from turbofit.machine.source import machine_from
from turbofit.planning.request import PlanRequest


def test_what_was_given_can_be_typed_again() -> None:
    request = PlanRequest.of(
        model="m", on="4xrtx3090", image_size=(640, 480), queue_images=False, no_tuned=True,
        enable_prefix_caching=True, margin="2%", budget="19GiB", async_=0, quant_policy="int8",
        cudagraph_capture_batch_sizes=[1, 2, 4], cache_max_entry_count=0.25, images=0,
    )  # fmt: skip
    typed = request.option_arguments(("model",))
    command = TURBOFIT.get_command(click.Context(TURBOFIT), "plan")
    assert command is not None
    with command.make_context("plan", ["m", *typed]) as ctx:
        assert filled(PlanRequest, {**ctx.params, "model": "m"}) == request


def test_what_has_no_text_cannot_be_typed() -> None:
    machine = machine_from("1xrtx3090")
    with pytest.raises(UsageError, match="on is no text"):
        PlanRequest.of(model="m", on=machine).option_arguments(("model",))


@pytest.mark.parametrize("field", ["model", "on"])
def test_a_path_that_is_no_utf8_is_refused(field: str) -> None:
    """No JSON document can have it: a plan of it was made and could not be written."""
    with pytest.raises(UsageError, match=r"models\\udcff is no text in UTF-8") as caught:
        PlanRequest.of(**{"model": "m", field: "/models\udcff"})
    assert caught.value.message.startswith(field)
    assert "symbolic link" in caught.value.hint
