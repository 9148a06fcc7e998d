"""What clients may call a model that is served."""

from __future__ import annotations

from msgspec.structs import replace

import turbofit
from tests.support.plans import model
from turbofit.core.model import ModelSource
from turbofit.launch.serve.config import ServeConfig


def test_every_name_that_people_know_it_by() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    hub, last = "OpenGVLab/InternVL2-2B", "InternVL2-2B"
    assert ServeConfig().client_names(plan) == (hub, "internvl2-2b", last)
    assert set(ServeConfig().names(plan).values()) == {hub}
    mine = ServeConfig(model_name="mine").client_names(plan)
    assert mine == ("mine", "internvl2-2b", hub, last)
    # As a plan of an older turbofit has it, or one that a program made of a model.
    assert ServeConfig().client_names(replace(plan, serve=None)) == (hub, last, "internvl2-2b")
    aliased = turbofit.plan("internvl2 2b", on="1xrtx3090")
    assert "internvl2 2b" in ServeConfig().client_names(aliased)


def test_a_folder_is_known_by_its_path_and_its_name() -> None:
    source = ModelSource(kind="folder", where="/m/My-VL", sizes="file", checkpoint="/m/My-VL")
    folder = model(name="My-VL", hub_id=None, source=source)
    plan = turbofit.plan(folder, on="1xa100-80g")
    assert ServeConfig().client_names(plan) == ("My-VL", "/m/My-VL")
    assert ServeConfig(model_name="x").client_names(plan) == ("x", "/m/My-VL", "My-VL")


def test_adapters_keep_their_names() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    names = ServeConfig(options=("--adapters", "sql=/lora")).names(plan)
    assert names["sql"] == "sql"
    assert names["internvl2-2b"] == "OpenGVLab/InternVL2-2B"
