"""What a launch's options say: names of its model, the address of its cluster."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.plans import model
from turbofit.core.errors import UsageError
from turbofit.core.model import Adapter, ModelSource
from turbofit.serving.options import ServeConfig, ray_address


def test_every_name_that_people_know_it_by() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    hub, last = "OpenGVLab/InternVL2-2B", "InternVL2-2B"
    assert ServeConfig().client_names(plan) == (hub, "internvl2-2b", last)
    mine = ServeConfig(model_name="mine").client_names(plan)
    assert mine == ("mine", "internvl2-2b", hub, last)
    lora = Adapter(name="sql", path="/lora", rank=8, modules=("q_proj",), file_bytes=1)
    names = ServeConfig().names(replace(plan, model=replace(plan.model, adapters=(lora,))))
    assert {*names.values()} == {hub, "sql"}
    assert (names["sql"], names["internvl2-2b"]) == ("sql", hub)
    # As a plan of an older turbofit has it, or one that a program made of a model.
    assert ServeConfig().client_names(replace(plan, serve=None)) == (hub, last, "internvl2-2b")
    aliased = turbofit.plan("internvl2 2b", on="1xrtx3090")
    assert "internvl2 2b" in ServeConfig().client_names(aliased)
    source = ModelSource(kind="folder", where="/m/My-VL", sizes="file", checkpoint="/m/My-VL")
    folder = turbofit.plan(model(name="My-VL", hub_id=None, source=source), on="1xa100-80g")
    assert ServeConfig().client_names(folder) == ("My-VL", "/m/My-VL")
    assert ServeConfig(model_name="x").client_names(folder) == ("x", "/m/My-VL", "My-VL")


@pytest.mark.parametrize("name", ["mine", "internvl2-2b", "InternVL2-2B", "internvl2 2b"])
def test_an_adapter_with_a_name_of_the_model(name: str) -> None:
    """Clients could ask only one of the two."""
    plan = turbofit.plan("internvl2 2b", on="1xrtx3090")
    lora = Adapter(name=name, path="/lora", rank=8, modules=("q_proj",), file_bytes=1)
    plan = replace(plan, model=replace(plan.model, adapters=(lora,)))
    with pytest.raises(UsageError, match=f"an adapter is called {name}"):
        ServeConfig(model_name="mine").refuse_names(plan)
    other = replace(plan.model, adapters=(replace(lora, name="sql"),))
    ServeConfig(model_name="mine").refuse_names(replace(plan, model=other))


def test_addresses() -> None:
    assert ray_address("ray") is None
    assert ray_address("ray:10.0.0.1:6379") == "10.0.0.1:6379"
    with pytest.raises(UsageError, match="no Ray cluster"):
        ray_address("slurm")
