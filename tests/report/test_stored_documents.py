"""Plans and runs that were kept: found again, and refused where they contradict themselves."""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest

from tests.hostile import hostile
from tests.report.documents import plan_page, planned, served_run
from tests.support.plans import plausible_plan
from turbofit.cli.main import main
from turbofit.core.cluster import ClusterPlan
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.core.presets import load_yaml
from turbofit.core.struct import decode, to_json
from turbofit.machine.kernels.census import Census
from turbofit.machine.source import load_snapshot
from turbofit.planning import calibrations
from turbofit.report.painters.terminal import paint
from turbofit.report.stored_documents import keep, read_saved, saved_document
from turbofit.report.views.plan_view import plan_view
from turbofit.serving import ladder
from turbofit.serving.leases import Leases

Patch = pytest.MonkeyPatch

Out = pytest.CaptureFixture[str]


def run_folder(state: Path, name: str = "20261120-100000-m", plan: Plan | None = None) -> Path:
    """A run's folder as `serve` leaves it."""
    plan = plan or plausible_plan()
    folder = state / "runs" / name
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "run.json").write_text(to_json(served_run(plan)))
    return folder


def test_latest_is_the_newest_of_plans_and_runs(state: Path) -> None:
    with pytest.raises(UsageError, match="nothing was planned"):
        read_saved("latest")
    assert not (state / "plans").exists()
    keep(plausible_plan(verdict="first"), "plan")
    keep(plausible_plan(verdict="second"), "rehearse")
    os.utime(state / "plans" / "plan.json", (1, 1))
    assert read_saved("latest").plan.verdict == "second"
    assert sorted(path.name for path in (state / "plans").iterdir()) == [
        "plan.json", "rehearse.json",
    ]  # fmt: skip
    assert (state / "plans" / "plan.json").stat().st_mode & 0o077 == 0
    folder = run_folder(state)
    future = (state / "plans" / "rehearse.json").stat().st_mtime + 10
    os.utime(folder / "run.json", (future, future))
    saved = read_saved("latest")
    assert saved.run is not None
    assert saved.where == str(folder)


def test_a_run_by_its_folder_its_record_its_name_or_its_report(state: Path) -> None:
    folder = run_folder(state)
    for word in (str(folder), str(folder / "run.json"), folder.name):
        saved = read_saved(word)
        assert saved.run is not None
        assert (saved.run.state, saved.plan.verdict) == ("ended", "fits")
    path = state / "run-report.json"
    path.write_text(to_json(saved_document(saved)))
    assert set(json.loads(path.read_text())) == {"schema", "plan", "run"}
    again = read_saved(str(path))
    assert (again.plan, again.run) == (saved.plan, saved.run)


def test_the_plan_is_that_of_the_last_attempt(state: Path) -> None:
    folder = run_folder(state)
    (folder / "plan-2.json").write_text(plausible_plan(verdict="a rung down").to_json())
    run = served_run(plausible_plan())
    last = msgspec.structs.replace(run.attempts[0], number=2)
    run = msgspec.structs.replace(run, attempts=(*run.attempts, last))
    (folder / "run.json").write_text(to_json(run))
    assert read_saved(str(folder)).plan.verdict == "a rung down"
    (folder / "plan-2.json").unlink()
    first = read_saved(str(folder)).plan
    assert first.verdict == plausible_plan().verdict
    assert first.warnings[-1].startswith("plan-2.json, the plan of the last start, is missing")


@pytest.mark.parametrize(
    ("data", "is_json"), [(b"a,b\n", False), (b"\xff\xd8", False), (b"{}", True)]
)
def test_a_file_that_is_not_json(tmp_path: Path, data: bytes, is_json: bool, capsys: Out) -> None:
    (tmp_path / "file").write_bytes(data)
    assert main(["report", str(tmp_path / "file")]) == 2
    assert ("not JSON" in capsys.readouterr().err) is not is_json


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "turbofit.run/9"}'])
def test_what_is_no_run(state: Path, text: str, capsys: Out) -> None:
    folder = run_folder(state)
    (folder / "run.json").write_text(text)
    assert main(["report", str(folder)]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("state")
def test_a_state_folder_that_cannot_be_written_costs_nothing(
    monkeypatch: Patch, capsys: Out
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert main(["plan", "qwen2.5-7b", "--on", "1xrtx3090"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("state")
def test_a_plan_from_stdin(monkeypatch: Patch, capsys: Out) -> None:
    document = plausible_plan().to_json()
    stdin: Any = type("Stdin", (), {"buffer": io.BytesIO(document.encode())})()
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["report", "-", "--json"]) == 0
    assert capsys.readouterr().out == document


@pytest.mark.usefixtures("state")
def test_a_file_of_a_command_that_failed_says_why_it_did(tmp_path: Path, capsys: Out) -> None:
    main(["plan", "nosuch", "--on", "1xrtx3090", "--json"])
    path = tmp_path / "plan.json"
    path.write_text(capsys.readouterr().out)
    with pytest.raises(UsageError) as caught:
        read_saved(str(path))
    assert caught.value.message == f"{path} holds an error, no plan: no model is known as 'nosuch'"
    assert "turbofit models" in caught.value.hint
    path.write_text('{"error": 5}')
    with pytest.raises(UsageError, match="cannot be read"):
        read_saved(str(path))


PLAN = plausible_plan()


def shown(path: Path) -> None:
    saved = read_saved(str(path))
    assert paint(plan_view(saved.plan, saved.run))
    assert plan_page(saved)


def run(path: Path) -> None:
    path.rename(path.with_name("run.json"))
    path.with_name("plan.json").write_text(PLAN.to_json())
    shown(path.parent)


def census(path: Path) -> None:
    found = decode(path.read_bytes(), Census, what="census")
    for capability in ((8, 6), (9, 0), (8, 7)):
        found.has_ptx(capability)
        found.count(tuple(found.families), found.architecture(capability) or "")


def moved(path: Path, place: Path) -> Path:
    """The document in its place in turbofit's state folder, which is the document's own."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(place)


def calibration(path: Path) -> None:
    moved(path, path.parent / "turbofit/learned/a/calibration-a.json")
    calibrations.with_calibrations(PLAN.machine, pretend=False)


def learned(path: Path) -> None:
    moved(path, ladder.learned_file(PLAN, "0.18.0", pretend=False).path)
    assert isinstance(ladder.recall(PLAN, "0.18.0", pretend=False), dict)


def lease(path: Path) -> None:
    folder = moved(path, path.parent / "leases/other.json").parent
    for _ in Leases(folder)._all():
        pass


#: By the first byte.
READERS = (
    shown, run, load_snapshot,
    lambda path: ClusterPlan.from_json(path.read_bytes()), census, calibration, learned, lease,
    load_yaml,
)  # fmt: skip


@hostile("documents")
def test_a_document_is_read_or_refused(data: bytes) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", folder)
        path = Path(folder) / "document.json"
        path.write_bytes(data[1:])
        with suppress(UsageError):
            READERS[(data[:1] or b"\0")[0] % len(READERS)](path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("engines",), []),
        (("engines", 0, "gpus"), [7]),
        (("machine", "gpus"), []),
        (("engines", 0, "ledgers"), []),
        (("engines", 0, "ledgers", 0, "total"), 0),
        (("engines", 0, "settings", "cache_block_seq_len"), 0),
        (("engines", 0, "kv", "tokens"), -1),
        (("promise", "context"), -1),
        (("engines", 0, "rehearsal", "timeline", 0, "peak"), []),
        (("engines", 0, "rehearsal", "cache", "region"), []),
    ],
)
def test_what_contradicts_itself_is_refused(
    path: tuple[Any, ...], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(changed(path, value))
    assert main(["report", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search("cannot be read: (its GPUs, .* contradict each other|Expected `)", said)


def changed(path: tuple[Any, ...], value: Any) -> str:
    document = json.loads(planned("served").to_json())
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(document)
