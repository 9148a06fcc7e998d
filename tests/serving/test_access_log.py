"""Where the access log goes, and its end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.gateway import gateway
from turbofit.core.errors import UsageError
from turbofit.serving.access_log import AccessLog, access_log


def test_after_the_end_of_its_gateway_it_keeps_nothing_and_fails_nobody(tmp_path: Path) -> None:
    """A restart after an engine's death begins a gateway, and with it a log of its own."""
    log = AccessLog(tmp_path / "access.log")
    app, _ = gateway(log=log)
    log({"b": "é"})
    asyncio.run(app.shutdown())
    log({"after": "the end"})
    assert json.loads((tmp_path / "access.log").read_text()) == {"b": "é"}


def test_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert access_log("none") is None
    to_stderr = access_log("-")
    assert to_stderr is not None
    to_stderr({"a": 1})
    assert json.loads(capsys.readouterr().err) == {"a": 1}
    kept = access_log(str(tmp_path / "log"))
    assert isinstance(kept, AccessLog)
    for number in (1, 2):
        kept({"a": number})
    kept.close()
    assert (tmp_path / "log").read_text() == '{"a": 1}\n{"a": 2}\n'
    with pytest.raises(UsageError, match="cannot be written"):
        access_log(str(tmp_path / "no" / "log"))
