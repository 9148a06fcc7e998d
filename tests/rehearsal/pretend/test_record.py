"""One record of a pretend machine's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.rehearsal.pretend.libraries import PretendError
from turbofit.rehearsal.pretend.record import read
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario

SCENARIO = Scenario((PretendGpu("Card", total=1 << 30),))


def timeline(pid: int, size: int) -> str:
    return f"I {pid} 1 0\nN a command\nP ready\nA 0 0 0 {size} {size} a\n"


def test_a_folder_is_one_record(tmp_path: Path) -> None:
    folder = tmp_path / "timelines"
    folder.mkdir()
    for name, size in (("10", 3), ("9", 1), ("9-1", 2)):
        text = timeline(int(name.partition("-")[0]), size)
        (folder / f"{name}.timeline").write_bytes(text.encode() + bytes(2000))
    machine = read(tmp_path, SCENARIO)
    held = [(memory.pid, memory.cards[0].in_use) for memory in machine.memories]
    assert held == [(9, 1), (9, 2), (10, 3)]
    assert machine.shared.processes == ()
    assert machine.memory_of(9).cards[0].peak == {"ready": 1}
    assert machine.memory_of(8).cards[0].peak == {}
    assert (folder / "9.timeline").read_bytes() == timeline(9, 1).encode()


def test_a_timeline_that_reached_its_end_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "timelines").mkdir()
    (tmp_path / "timelines" / "9.timeline").write_text(timeline(9, 1))
    machine = read(tmp_path, SCENARIO)
    with pytest.raises(PretendError):
        machine.memory_of(9)
