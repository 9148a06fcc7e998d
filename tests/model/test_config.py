"""JSON of a config: what is read, and what is refused."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import make_text
from tests.support.tiny_checkpoints import make
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def test_not_a_number_is_json_too(tmp_path):
    folder = make(tmp_path / "x")
    text = (tmp_path / "x" / "config.json").read_text()
    (tmp_path / "x" / "config.json").write_text(text[:-1] + ', "limit": [0.0, Infinity, NaN]}')
    assert resolve_model(folder).parameters


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a":}', "\udcff", "[" * 200_000])
def test_broken_json(tmp_path, text):
    folder = make_text(tmp_path / "x")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError):
        resolve_model(str(folder))
