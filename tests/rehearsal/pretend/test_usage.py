"""What the processes of a pretend machine used, by their timelines."""

from __future__ import annotations

from pathlib import Path

from turbofit.rehearsal.pretend.usage import Event, TimelineReader, Usage, read_timeline, read_usage


def usage(tmp_path: Path, *lines: str) -> Usage:
    path = tmp_path / "1.timeline"
    path.write_text("\n".join(lines) + "\n")
    return read_usage(read_timeline(path))


def test_phases_and_the_site_of_a_refusal(tmp_path: Path) -> None:
    seen = usage(
        tmp_path,
        "I 7 3 1,0",
        "N python  train.py --x",
        "K 1 100 900 @",
        "P load weights",
        "A 1 0 -1 512 512 9c @",
        "A 1 3 -1 4096 4096 aa @",
        "P step",
        "A 1 1 0 1024 1536 9d @",
        "F 9c 1024",
        "A 1 0 -1 200 1224 9f @",
        "R 1 0 0 200",
        "P end",
        "S before.py:1",
        "O 1 0 -1 9000 500 8500 @",
        "S big.py:9",
    )
    assert (seen.pid, seen.parent, seen.command) == (7, 3, "python  train.py --x")
    assert seen.phases == {1: {"load weights": 512, "step": 1536, "end": 200}}
    assert seen.ends == {1: {"load weights": 512, "step": 200, "end": 200}}
    assert seen.contexts == {1: 100}
    empty = usage(tmp_path)
    assert (empty.pid, empty.phases, empty.refused) == (0, {}, [])
    (refusal,) = seen.refused
    assert (refusal.requested, refusal.left, refusal.short) == (9000, 500, 8000)
    assert (refusal.phase, refusal.site, refusal.kind) == ("end", "big.py:9", "cudaMalloc")


def test_a_timeline_is_read_to_where_it_ends_and_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "timeline"
    reader = TimelineReader(path)
    # Zero bytes, or a line that is not finished, end it.
    path.write_bytes(b"P case one image\nA 0 1 2 512 1024 9c @1f,2e\nP con" + bytes(4096))
    first = [
        Event("P", ("case one image",), ()),
        Event("A", ("0", "1", "2", "512", "1024", "9c"), (0x1F, 0x2E)),
    ]
    assert list(read_timeline(path)) == list(reader.new_events()) == first
    # What was read is not read again: it could be anything now.
    path.write_bytes(b"X" * 44 + b"P context\nF 1f 0\n" + bytes(4096))
    assert list(reader.new_events()) == [Event("P", ("context",), ()), Event("F", ("1f", "0"), ())]
    assert list(reader.new_events()) == []
