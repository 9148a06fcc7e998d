"""What the processes of a pretend machine used, by their timelines."""

from __future__ import annotations

from pathlib import Path

from turbofit.rehearsal.pretend.usage import Event, timeline_events


def test_a_timeline_is_read_to_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "timeline"
    # Zero bytes, or a line that is not finished, end it.
    path.write_bytes(b"P case one image\nA 0 1 2 512 1024 9c @1f,2e\nP con" + bytes(4096))
    events = [
        Event("P", ("case one image",), ()),
        Event("A", ("0", "1", "2", "512", "1024", "9c"), (0x1F, 0x2E)),
    ]
    with path.open("rb") as file:
        assert list(timeline_events(file)) == events
        assert file.tell() == 44
