"""What a person may ask for, and how a wrong value is refused."""

from __future__ import annotations

import pickle
from typing import Any

import click
import numpy as np
import pytest
from msgspec.structs import fields
from pydantic import ValidationError

from turbofit.cli.main import TURBOFIT
from turbofit.cli.options.field_options import filled
from turbofit.core.errors import UsageError
from turbofit.core.plan import Settings
from turbofit.machine.spec import parse_spec
from turbofit.planning.request import ENGINE_OPTIONS, PlanRequest, PredictRequest
from turbofit.planning.resolved_request import Margin


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"margin": "2%"}, {"margin": "2%"}),
        ({"image_size": "1080p"}, {"image_size": (1920, 1080)}),
        ({"dtype": "fp16"}, {"dtype": "float16"}),
        ({"context": "32,768"}, {"context": 32768}),
        ({"context": "max"}, {"context": "max"}),
        ({"budget": "19.5 GB"}, {"budget": 19_500_000_000}),
        ({"budget": "0.90"}, {"budget": "90%"}),
        ({"image_size": "4k"}, {"image_size": (3840, 2160)}),
        ({"image_size": "1,024 x 768"}, {"image_size": (1024, 768)}),
        ({"max_pixels": "1280*28*28"}, {"max_pixels": 1_003_520}),
        ({"max_pixels": "12.8 MP"}, {"max_pixels": 12_800_000}),
        ({"cache_max_entry_count": "80%"}, {"cache_max_entry_count": 0.8}),
        ({"quant_policy": "8-bit"}, {"quant_policy": 8}),
        ({"margin": 1 << 29}, {"margin": 1 << 29}),  # a whole number of Python is bytes
        ({"margin": 0}, {"margin": 0}),
        ({"budget": 0.9}, {"budget": "90%"}),  # a number of Python means what its text means
        ({"image_size": 448}, {"image_size": (448, 448)}),
        ({"images": np.int64(2), "tp": np.int32(1)}, {"images": 2, "tp": 1}),
        ({"budget": np.float64(0.9)}, {"budget": "90%"}),
        ({"image_size": [np.int64(640), 480]}, {"image_size": (640, 480)}),
        ({"dtype": "auto"}, {}),  # LMDeploy's word for "choose"
        ({"cudagraph_capture_batch_sizes": [1, 2]}, {"cudagraph_capture_batch_sizes": (1, 2)}),
    ],
)
def test_words_that_people_write_are_read(given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert PlanRequest(model="m", **given).given() == {"model": "m", **meant}


def test_a_size_below_a_mebibyte_stays_what_its_unit_says() -> None:
    request = PlanRequest.of(model="m", margin="10KiB", budget="512B").changed(images=2)
    assert (request.margin, request.budget) == (10 << 10, 512)
    with pytest.raises(UsageError, match="512 bytes"):
        request.changed(margin=512)


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"images": -1}, "images -1: it should be 0 or more", "images a request"),
        ({"concurrency": 10**12}, "it should be 1048576 or less", "over all replicas"),
        ({"concurrency": True}, "concurrency True: it should be a whole number", "at once"),
        ({"goal": "througput"}, "goal 'througput': it should be", "did you mean throughput?"),
        (
            {"max_batchsize": 4},
            "PlanRequest has no field max_batchsize",
            "did you mean max_batch_size",
        ),
        ({"margin": "many%"}, "margin 'many%' is no share of a card", "2%"),
        ({"engine": "sglang"}, "engine 'sglang': it should be 'auto'", "the first engine that"),
        ({"cache_max_entry_count": 1.0}, "it should be less than 1", "share of the free"),
        ({"quant_policy": 5}, "quant_policy 5: it should be 0, 4, 8", "cache"),
        ({"budget": "lots"}, "'lots' is not a size", "19GiB"),
        ({"image_size": "2k"}, "image_size '2k' is not", "write it as 1920x1080"),
        ({"image_size": "[640, 480]"}, "image_size '[640, 480]' is not", "write it as 1920x1080"),
        ({"context": "32.768"}, "context '32.768' is not a whole number", "32 or 32768"),
        ({"context": "1,5"}, "context '1,5': it should be a whole number", "answer included"),
        ({"margin": "1"}, "margin: 1 bytes?", "for 1 GiB write 1GiB"),
        ({"margin": 512}, "margin: 512 bytes?", "for 512 MiB write 512MiB"),
        ({"image_size": [640]}, "image_size [640]: it should have 2 items", "width and height"),
        ({"image_size": (20_000, 20_000)}, "image_size 20000x20000 has 400,000,000", "89,478,485"),
        ({"image_size": "70000x8"}, "image_size 70000: it should be 65535 or less", "width"),
        ({"max_pixels": "90 MP"}, "it should be 89478485 or less", "pixels"),
        ({"image_size": (1, 2, 3)}, "it should have 2 items", "width and height"),
        ({"images": -1.5}, "it should be a whole number", "image_size is their size"),
        ({"images": np.bool_(1)}, "it should be a whole number", "images a request"),
        ({"tp": "4"}, "tp '4': it should be a whole number", "GPUs of one engine"),
        ({"tp": "4.0"}, "tp '4.0' is not a whole number", "write it as 4"),
        ({"tp": "auto"}, "tp 'auto': it should be a whole number", "tp: GPUs of one engine"),
        ({"on": 4}, "on 4: it should be a text", "4xrtx3090"),
        ({"queue_images": "no"}, "queue_images 'no': it should be True or False", "wait"),
        ({"communicator": "x" * 500}, "communicator 'xxx", "how the GPUs of an engine"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(
    given: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        PlanRequest.of(model="m", **given)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert len(caught.value.message) < 200
    with pytest.raises(UsageError):
        PlanRequest(model="m", **given)
    # FastAPI answers 422 to pydantic's own; a UsageError would be a failure of the server there.
    with pytest.raises(ValidationError):
        PlanRequest.model_validate({"model": "m", **given})


def test_a_request_without_its_model_is_told_in_a_line() -> None:
    with pytest.raises(UsageError, match="model is not given"):
        PlanRequest()


def test_a_command_line_has_texts_alone() -> None:
    words = {"model": "m", "tp": "4", "context": "4k", "image_size": "640X480", "async_": "1"}
    assert PlanRequest.of_options(words, str).given() == {
        "model": "m", "tp": 4, "image_size": (640, 480), "context": 4096, "async_": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match="model is not given"):
        PlanRequest.of()
    # Every setting of a plan can be fixed.
    assert set(ENGINE_OPTIONS) == {field.name for field in fields(Settings)} - {"tp"}


def test_what_was_given_is_kept_apart_from_defaults_and_travels() -> None:
    request = PlanRequest(model="m", images=1, tp=None)
    assert request.given() == {"model": "m", "images": 1}
    smaller = request.changed(max_batch_size=4, images=2)
    assert smaller.given() == {"model": "m", "images": 2, "max_batch_size": 4}
    assert smaller.changed(max_batch_size=None).engine_options == {}
    assert request.engine_options == {}  # it did not change itself
    request = PlanRequest(model="m", on=parse_spec("2xrtx3090"), margin="2%", tp=2)
    assert pickle.loads(pickle.dumps(request)) == request
    again = PlanRequest.model_validate_json(request.model_dump_json())
    assert again == request
    assert again.margins == Margin(share=0.02)


def test_what_no_field_or_text_can_hold_is_refused() -> None:
    request = PredictRequest.of(model="m", free_at_cache="2780MiB", lmdeploy="0.6.4")
    assert request.free_at_cache == 2780 << 20
    with pytest.raises(UsageError, match="PlanRequest has no field free_at_cache"):
        PlanRequest.of(model="m", free_at_cache=1)
    with pytest.raises(UsageError, match="on is no text"):
        PlanRequest.of(model="m", on=parse_spec("1xrtx3090")).option_arguments(("model",))
    # No JSON document can have such a path: a plan of it was made and could not be written.
    with pytest.raises(UsageError, match=r"^on .*models\\udcff is no text in UTF-8") as caught:
        PlanRequest.of(model="m", on="/models\udcff")
    assert "symbolic link" in caught.value.hint


def test_what_was_given_can_be_typed_again() -> None:
    request = PlanRequest.of(
        model="m", on="4xrtx3090", image_size=(640, 480), queue_images=False, no_tuned=True,
        enable_prefix_caching=True, margin="2%", budget="19GiB", async_=0, quant_policy="int8",
        cudagraph_capture_batch_sizes=[1, 2, 4], cache_max_entry_count=0.25, images=0,
    )  # fmt: skip
    typed = request.option_arguments(("model",))
    command = TURBOFIT.get_command(click.Context(TURBOFIT), "plan")
    with command.make_context("plan", ["m", *typed]) as ctx:
        assert filled(PlanRequest, {**ctx.params, "model": "m"}) == request
