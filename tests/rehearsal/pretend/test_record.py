"""One record of a pretend machine's folder, and the memory of a process that still runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.rehearsal.pretend import record
from turbofit.rehearsal.pretend.libraries import PretendError
from turbofit.rehearsal.pretend.record import TimelineMemory, read
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


def test_a_reading_goes_on_and_begins_anew_after_half_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_sites", lambda _library: None)
    path = tmp_path / "timeline"
    memory = TimelineMemory(path, SCENARIO, tmp_path)
    assert memory.read() is None  # nothing yet
    path.write_text(timeline(9, 1))
    first = memory.read()
    assert first is not None
    assert first.cards[0].in_use == 1
    with path.open("a") as file:
        file.write("A 0 0\n")
    assert memory.read() is None
    path.write_text(timeline(9, 2))
    again = memory.read()
    assert again is not None
    assert again.cards[0].in_use == 2
