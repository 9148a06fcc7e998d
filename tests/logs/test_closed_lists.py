"""LMDeploy's own closed lists, read from its wheel: each member has its row."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

from tests.logs.conftest import explain
from turbofit.logs.causes import hits_of, table
from turbofit.logs.log_events import PythonFrame

pytestmark = pytest.mark.lmdeploy

#: Members that tell of no failure.
SUCCEED: Final = {"SUCCESS", "FINISH", "CANCEL"}
#: Files whose warnings are of options that LMDeploy leaves out or changes.
WARN: Final = (
    "serve/core/async_engine.py", "serve/core/vl_async_engine.py", "turbomind/turbomind.py",
    "turbomind/converter.py", "pytorch/config.py", "pytorch/engine/config_builder.py",
    "pytorch/engine/executor/base.py", "messages.py",
)  # fmt: skip
#: Words of such a warning.
LEAVES_OUT: Final = re.compile(
    r"not (?:been )?support|not available|is disabled|not enabled|downgraded|will be ignored"
    r"|[Cc]an not perform|Fallback to|setting both|hasn't|^Update max|No enough memory"
)


def source(path: str) -> ast.Module:
    spec = find_spec("lmdeploy")
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / path).read_text())


def text_in(node: ast.expr) -> str:
    """The constant parts of a string, with 1 for each value."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in parts)


def test_each_response_by_which_a_request_fails_has_its_meaning() -> None:
    enum = next(
        node
        for node in source("messages.py").body
        if isinstance(node, ast.ClassDef) and node.name == "ResponseType"
    )
    members = {
        target.id
        for node in enum.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert members - SUCCEED == set(table().responses)
    for member in members - SUCCEED:
        found = explain(
            f'lmdeploy - ERROR - a.py:1 - session 8 finished, ResponseType.{member}, "e"'
        )
        assert member in found.what


def test_each_warning_of_an_option_that_is_left_out_has_a_row() -> None:
    calls = [
        node
        for path in WARN
        for node in ast.walk(source(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logger.warning"
    ]
    told = [text for call in calls if LEAVES_OUT.search(text := text_in(call.args[0]))]
    assert len(told) >= 8
    line = "2026-06-14 09:11:02,114 - lmdeploy - WARNING - a.py:129 - {}"
    kinds = {text: [hit.row.kind for hit in hits_of(line.format(text))] for text in told}
    assert {text: kind for text, kind in kinds.items() if "ignored_option" not in kind} == {}


def test_each_check_of_an_option_has_a_row() -> None:
    """With its message alone, or, of a check without a message, by its place."""
    frame = PythonFrame(path="/v/lmdeploy/messages.py", function="__post_init__", code="assert x")
    configs = [
        node
        for node in source("messages.py").body
        if isinstance(node, ast.ClassDef) and node.name.endswith("EngineConfig")
    ]
    checks = [
        node for config in configs for node in ast.walk(config) if isinstance(node, ast.Assert)
    ]
    assert len(checks) > 20
    for check in checks:
        text = "AssertionError" + (f": {text_in(check.msg)}" if check.msg else "")
        hits = hits_of(text, stack=() if check.msg else (frame,))
        assert "wrong_setting" in [hit.row.kind for hit in hits], text
