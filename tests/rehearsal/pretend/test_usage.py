"""What the processes of a pretend machine used, by their timelines."""

from __future__ import annotations

from pathlib import Path

from turbofit.rehearsal.pretend.usage import Event, TimelineReader


def test_a_timeline_is_read_to_where_it_ends_and_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "timeline"
    reader = TimelineReader(path)
    # Zero bytes, or a line that is not finished, end it.
    path.write_bytes(b"P case one image\nA 0 1 2 512 1024 9c @1f,2e\nP con" + bytes(4096))
    first = [
        Event("P", ("case one image",), ()),
        Event("A", ("0", "1", "2", "512", "1024", "9c"), (0x1F, 0x2E)),
    ]
    assert list(reader.new_events()) == first
    # What was read is not read again: it could be anything now.
    path.write_bytes(b"X" * 44 + b"P context\nF 1f 0\n" + bytes(4096))
    assert list(reader.new_events()) == [Event("P", ("context",), ()), Event("F", ("1f", "0"), ())]
    assert list(reader.new_events()) == []
