"""``turbofit watch`` over a run's folder, with a gateway's page behind it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

import turbofit.api
from tests.observe.test_live import server  # noqa: F401 - a fixture
from turbofit.cli.main import main
from turbofit.gateway.routing.deny_file import DenyFile, deny_path
from turbofit.launch.engine.kernel import start_time
from turbofit.report.stored_documents import read_saved


@pytest.fixture
def folder(state: Path) -> Path:
    run = state / "runs" / "20261120-101500-InternVL2-8B"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(turbofit.api.plan("internvl2-8b", on="1xrtx3090").to_json())
    return run


def record(folder: Path, **facts: object) -> None:
    document = {
        "schema": "turbofit.run/1", "turbofit_version": "0", "started": "today", "pretend": True,
        "attempts": [], "events": [], **facts,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(document))


def test_a_gateways_page(folder: Path, server: str, capsys) -> None:  # noqa: F811
    words = "where a request does not say otherwise: top_p 0.9"
    record(folder, state="ready", urls=[server], defaults=[words])
    assert main(["watch", "--api-key", "right", "--interval", "0.2"]) == 0
    told = capsys.readouterr().out
    assert "3 requests waiting" in told
    assert words in told
    assert "\x1b" not in told
    assert main(["watch", folder.name, "--api-key", "right", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["defaults"]) == ("turbofit.watch/1", [words])
    assert told["now"]["waiting"] == 3
    assert told["forecast"]["0"]["peak"] > told["forecast"]["0"]["steady"]


def test_all_models_of_a_server_are_shown(folder: Path, capsys) -> None:
    here = os.getpid()
    for place, model in ((folder, "InternVL2-8B"), (folder.with_name("1-B"), "InternVL2-1B")):
        place.mkdir(exist_ok=True)
        (place / "plan.json").write_bytes((folder / "plan.json").read_bytes())
        record(place, state="starting", model=model, pid=here, pid_started=start_time(here))
    assert main(["watch", "--once"]) == 0
    assert capsys.readouterr().out.count("starting, started today") == 2
    assert main(["watch", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2
    assert main(["watch", folder.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "starting"


def test_what_runs_goes_before_what_ended_later(folder: Path, capsys) -> None:
    """Whose port was taken, for one."""
    record(folder, state="ready", model="InternVL2-8B", pid=os.getpid(),
           pid_started=start_time(os.getpid()))  # fmt: skip
    later = folder.with_name("20261120-111500-InternVL2-1B")
    later.mkdir()
    (later / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    record(later, state="failed", model="InternVL2-1B", pid=os.getpid(), pid_started=1)
    assert main(["watch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "ready"
    record(folder, state="ended", model="InternVL2-8B", pid=os.getpid(), pid_started=1)
    os.utime(later / "run.json", (2e9, 2e9))
    assert main(["watch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--interval", "0"], "should be 0.2 or more"),
        (["--url", "http://127.0.0.1:9"], "nobody answers"),
        (["no-such-run"], "no run is called"),
        (["http://127.0.0.1:9"], "is an address, not a run"),
    ],
)
def test_errors(folder: Path, arguments: list[str], cause: str, capsys) -> None:
    record(folder, state="ready")
    assert main(["watch", "--once", *arguments]) == 2
    error = capsys.readouterr().err
    assert cause in error
    assert "hint:" in error


def test_nothing_was_served(state: Path, capsys) -> None:
    assert main(["watch", "--once"]) == 2
    assert "nothing was served yet" in capsys.readouterr().err


def test_a_request_is_let_in_again(folder: Path, capsys) -> None:
    record(folder, state="starting", lmdeploy="0.18.0")
    plan = read_saved(folder.name).plan
    file = DenyFile(Path(deny_path(plan, "0.18.0", pretend=True) or ""))
    file.deny("a1b2c3", 2, 60.0, client=False)
    file.deny("a client", 4, 60.0, client=True)
    assert asyncio.run(file.write())
    assert main(["watch", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["denied"]
    assert [(one["name"], one["deaths"]) for one in told] == [("a1b2c3", 2), ("a client", 4)]
    assert main(["watch", "--forget", "a1b2c3"]) == 0
    assert "is let in again" in capsys.readouterr().out
    assert main(["watch", "--forget", "a client", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forgotten"] == "a client"
    assert main(["watch", "--forget", "a1b2c3"]) == 2
    assert "no request or client a1b2c3 is refused" in capsys.readouterr().err
    assert DenyFile(file.path).denied == {}
