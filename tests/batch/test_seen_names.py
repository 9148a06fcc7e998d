from __future__ import annotations

import pytest

from turbofit.batch.seen_names import SeenNames


@pytest.mark.parametrize("count", [0, 1, 1000, 20000])
def test_names_are_new_once(count) -> None:
    names = [f"name-{number}" for number in range(count)] + ["", "\ud800", "ü" * 1000]
    seen = SeenNames(len(names))
    assert all(seen.add(name) for name in names)
    assert not any(seen.add(name) for name in names)


@pytest.mark.parametrize("count", [1000, 43690, 43691, 65536, 1_000_000])
def test_memory_is_some_bytes_a_name(count) -> None:
    assert 12 * count <= len(SeenNames(count)._slots) * 8 <= 25 * count
