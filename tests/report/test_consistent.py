from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.documents import KINDS, planned, served_run
from turbofit.cli.main import main
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.report.painters.terminal import paint
from turbofit.report.stored_documents import StoredPlan, check_consistent, read_plan
from turbofit.report.views.plan_view import plan_page, plan_view

#: Parts of a document that no report computes with, or too many to try one by one.
LEFT_OUT = ("model", "considered", "ledger", "turbofit_version", "created")


@pytest.mark.parametrize("kind", [*KINDS, "served", "died"])
def test_what_turbofit_writes_hangs_together(kind: str) -> None:
    check_consistent(planned(kind), kind)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("parallel", "groups"), []),
        (("parallel", "groups", 0), [7]),
        (("machine", "gpus"), []),
        (("gpus",), []),
        (("gpus", 0, "total"), 0),
        (("settings", "cache_block_seq_len"), 0),
        (("kv", "longest_request_tokens"), -1),
        (("rehearsal", "timeline", 0, "peak"), []),
        (("rehearsal", "cache", "region"), []),
    ],
)
def test_what_contradicts_itself_is_refused(
    path: tuple[Any, ...],
    value: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(changed(path, value))
    assert main(["report", str(file)]) == 2
    said = capsys.readouterr().err
    assert "cannot be read: its GPUs, groups, sizes and rehearsal contradict each other" in said


def changed(path: tuple[Any, ...], value: Any) -> str:
    document = json.loads(planned("served").to_json())
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(document)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place of a document, of lists the first entry only."""
    yield path, value
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in LEFT_OUT:
                yield from leaves(one, (*path, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


def test_no_number_and_no_empty_list_breaks_a_report(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shown = 0
    for path, value in leaves(json.loads(planned("served").to_json())):
        if isinstance(value, bool | str | None) or not path:
            continue
        for other in [0, -1, 1 << 61] if isinstance(value, int | float) else [type(value)()]:
            file.write_text(changed(path, other))
            try:
                plan = read_plan(str(file))
            except UsageError:
                continue
            assert isinstance(plan, Plan)
            run = served_run(planned("served"))
            assert paint(plan_view(plan, run)), path
            assert plan_page(StoredPlan(plan, run, "x")), path
            shown += 1
    assert shown > 150
