"""A pretend machine's description, and the twin of a real machine."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.errors import MachineError
from turbofit.core.machine import Link
from turbofit.core.struct import NA, decode, to_json
from turbofit.machine.source import machine_from
from turbofit.rehearsal.pretend.libraries import PretendError
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario, pretend_twin


def test_the_twin_of_a_machine_that_is_known() -> None:
    links = (Link(a=1, b=3, p2p_read=True, p2p_write=True), Link(a=0, b=1, p2p_read=True))
    four = replace(machine_from("4xl4:used=100MiB"), links=links)
    scenario = pretend_twin(four, [3, 1, 0])
    first, gpu = scenario.gpus[0], four.gpus[3]
    assert (first.total, first.used) == (int(gpu.total) - int(gpu.reserved), gpu.used)
    assert scenario.peers == frozenset({(0, 1), (1, 0)})
    unread = replace(four, gpus=(replace(four.gpus[0], l2=NA),))
    with pytest.raises(MachineError, match="l2 is not known"):
        pretend_twin(unread, [0])


def test_scenario_text_has_everything() -> None:
    card = PretendGpu(
        "NVIDIA  GeForce\nRTX 3090", total=1000, used=10, sm=(8, 6), sm_count=82, l2=6291456
    )
    scenario = Scenario((card, card), peers=frozenset({(0, 1)}), fail_at=512)
    assert decode(to_json(scenario), Scenario, what="scenario") == scenario
    lines = scenario.text("/t").splitlines()
    named = "device 1000 10 0 8 6 82 6291456 102400 101376 NVIDIA GeForce RTX 3090"
    assert {named, "peer 0 1", "fail_at 512", "timeline /t"} <= set(lines)
    assert "peer 1 0" not in lines
    with pytest.raises(PretendError, match=r"compute capability 6\.1"):
        Scenario((PretendGpu("GTX 1080", total=1, sm=(6, 1)),)).text("/t")
