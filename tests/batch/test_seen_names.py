from __future__ import annotations

from turbofit.batch.seen_names import SeenNames


def test_names_are_new_once() -> None:
    seen = SeenNames()
    names = [f"name-{number}" for number in range(20000)] + ["", "\ud800", "ü" * 1000]
    assert all(seen.add(name) for name in names)
    assert not any(seen.add(name) for name in names)


def test_memory_is_some_bytes_a_name() -> None:
    seen = SeenNames()
    for number in range(50000):
        seen.add(str(number))
    assert len(seen._slots) * 8 <= 24 * 50000
