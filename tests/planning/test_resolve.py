"""A request as the search takes it: its machine, and what contradicts itself."""

from __future__ import annotations

import pytest

import turbofit
from turbofit import api
from turbofit.core.errors import UsageError
from turbofit.machine.source import machine_from
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve


def test_gpus_of_a_machine_are_kept_to_as_those_of_its_spec():
    machine = machine_from("1xl4+1xa100")
    for on in (machine, "1xl4+1xa100"):
        request = PlanRequest(model="internvl2-8b", on=on, gpus="1")
        assert resolve(request).machine.visible == (1,)
        assert {gpu.index for gpu in turbofit.plan(request).gpus} == {1}
        told = turbofit.predict("internvl2-8b", on=on, gpus="1")
        assert {gpu.index for gpu in told.gpus} == {1}
        with pytest.raises(UsageError, match="--gpus: '9' is not one GPU of this machine"):
            resolve(request.changed(gpus="9"))


def test_which_keeps_to_the_gpus_of_a_machine():
    found = turbofit.which(on=machine_from("1xl4+1xa100"), gpus="0", images=0, context=1024)
    assert {row.gpus for row in (*found.keep, *found.others)} == {1}
    assert "internvl2-26b" in {row.model for row in found.others}


def test_rehearse_torch_keeps_to_the_gpus_of_a_machine():
    with pytest.raises(UsageError, match="not one GPU of this machine"):
        api.rehearse_torch("internvl2-1b", on=machine_from("2xl4"), gpus="9", engine="transformers")
