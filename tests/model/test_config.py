"""JSON of checkpoints: what is read of a key, and what is refused."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import make_text
from turbofit.core.errors import UsageError
from turbofit.model.config import Section
from turbofit.model.source import resolve_model


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a":}', "\udcff", "[" * 200_000])
def test_broken_json(tmp_path, text):
    folder = make_text(tmp_path / "x")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (True, "is not an integer but True"),
        ([448, 224], "is not an integer but"),
        (10**400, "is an absurd number, not within 1..16777216"),
        (3, "3 does not divide 64 channels"),
    ],
)
def test_a_divisor_is_checked(value: object, problem: str) -> None:
    assert Section({"heads": [8, 8]}, "c").divisor("heads", 64, "channels") == 8
    with pytest.raises(UsageError, match=problem):
        Section({"heads": value}, "c").divisor("heads", 64, "channels", high=1 << 24)
