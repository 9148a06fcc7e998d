"""The types of what `msgspec.structs.replace` changes are checked, by a plugin for mypy."""

from __future__ import annotations

from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PROGRAM = """
from msgspec import UNSET
from msgspec.structs import replace
from turbofit.core.plan import Plan

def changed(plan: Plan) -> tuple[Plan, ...]:
    return (
        replace(plan, usual_image=UNSET, fits=False),
        replace(plan, usual_image=None),
        replace(plan, no_field=1),
    )
"""


def test_a_record_is_not_null_where_its_type_says_otherwise(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM.lstrip())
    config, cache = str(_ROOT / "pyproject.toml"), str(_ROOT / ".mypy_cache")
    found, _, status = api.run(["--config-file", config, "--cache-dir", cache, str(program)])
    errors = [line for line in found.splitlines() if "error:" in line]
    assert status == 1
    assert [line.split(":")[1] for line in errors] == ["8", "9"], found
    assert '"usual_image"' in errors[0]
    assert '"no_field"' in errors[1]
