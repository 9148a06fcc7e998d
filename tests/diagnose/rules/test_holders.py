"""Who held the card: this process under another pid, others, or one of the two."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain, some
from turbofit.diagnose.answer import Diagnosis
from turbofit.machine.source import machine_from
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

CARD = "GPU 0 has a total capacity of 23.69 GiB of which 80.00 MiB is free. "
SERVER = "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B   # 1x RTX 3090\n"


def text(processes: str, allocated: str = "2.85 GiB", cached: str = "71.87 MiB") -> str:
    return (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 132.00 MiB."
        f" {CARD}{processes}"
        f"Of the allocated memory {allocated} is allocated by PyTorch, and {cached} is reserved by"
        " PyTorch but unallocated.\n"
    )


def pid(number: int, size: str) -> str:
    return f"Process {number} has {size} memory in use. "


def told(found: Diagnosis) -> str:
    return " ".join((*found.why, *found.changes, *found.unknown))


def test_the_only_process_is_the_server_itself() -> None:
    found = explain(SERVER + text(pid(2203446, "23.61 GiB")))
    assert [one.who for one in found.held] == ["this process (process 2203446 of the text)"]
    assert "outside torch" in told(found)
    assert not any("2203446" in one for one in found.changes)
    # Both readings, and what to look at.
    assert "whether process 2203446 is this server" in told(found)
    assert "docker top" in told(found)
    assert "--query-compute-apps" in told(found)


def test_a_machine_whose_cards_others_fill_is_planned_as_empty() -> None:
    listed = (
        pid(7, "23.61 GiB")
        + "Including non-PyTorch memory, this process has 0.50 GiB memory in use. "
    )
    found = explain(text(listed, "0.10 GiB"), model="internvl2-8b", on="4xrtx3090")
    assert some(found.would_work).fits
    assert some(found.would_work).verdict.startswith("once the cards are free")
    assert any("if it is no part of this server" in one for one in found.changes)


@pytest.mark.parametrize("on", ["1xrtx3090:free=20GiB", "rtx3090+rtx4090"])
def test_what_others_hold_is_taken_from_any_machine(on: str) -> None:
    listed = (
        pid(7, "3.00 GiB")
        + "Including non-PyTorch memory, this process has 20.61 GiB memory in use. "
    )
    found = explain(text(listed, "19.00 GiB"), model="internvl2-2b", on=on)
    assert some(found.would_work).fits
    assert "3.0 GiB of each card held by others" in some(found.would_work).on


def test_one_of_several_is_not_guessed() -> None:
    found = explain(
        text(pid(11, "9.00 GiB") + pid(12, "14.00 GiB")), model="internvl2-8b", on="1xrtx3090"
    )
    assert {one.who for one in found.held} == {
        "process 11: this one or another", "process 12: this one or another",
    }  # fmt: skip
    assert "which of the processes 11, 12 is this one" in told(found)
    assert any(one.startswith("tell this server's processes from others") for one in found.changes)
    assert some(found.would_work).on == "1xrtx3090"


def test_lmdeploy_s_figures_do_not_tell_which() -> None:
    listed = pid(11, "3.30 GiB") + pid(12, "20.00 GiB")
    assert "this one or another" in explain(SERVER + text(listed)).held[0].who
    # Elsewhere torch holds all that a process has.
    plain = explain(text(listed))
    assert [one.who for one in plain.held] == [
        "this process (process 11 of the text)",
        "process 12",
    ]


@pytest.mark.parametrize(("reserved", "others"), [("22.90 GiB", 0), ("12.00 GiB", 11 * 1024)])
def test_a_context_of_torch_2_0_is_charged_once(reserved: str, others: int) -> None:
    found = explain(
        "RuntimeError: CUDA out of memory. Tried to allocate 136.00 MiB (GPU 1; 23.69 GiB total"
        f" capacity; 11.90 GiB already allocated; 43.69 MiB free; {reserved} reserved in total by"
        " PyTorch)\n",
        model="cogvlm-17b",
        on="2xrtx3090",
    )
    if others:
        assert "explained by nobody" in told(found)
        return
    assert some(found.would_work).on == "2xrtx3090"
    alone = plan(PlanRequest.of(model="cogvlm-17b", on=machine_from("2xrtx3090")))
    assert some(found.would_work).verdict == alone.verdict
