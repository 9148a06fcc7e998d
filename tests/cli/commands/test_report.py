"""`turbofit report` of files that are no documents of turbofit."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.cli.main import main

Out = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        *((text, "cannot be read") for text in ("", "{}", "null", "\x00", "{" * 5000)),
        ('{"schema": "turbofit.plan/1"}', "cannot be read"),
        (replace(plausible_plan(), schema="turbofit.plan/9").to_json(), "turbofit.plan/9"),
    ],
    ids=range(7),
)
def test_what_is_no_plan(text: str, cause: str, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    assert cause in capsys.readouterr().err
    assert main(["serve", "--plan", str(path)]) == 2
