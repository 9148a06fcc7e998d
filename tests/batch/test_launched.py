"""A batch that plans and starts its server: LMDeploy's real one, on pretend GPUs."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests.batch.standin import lines
from tests.support.processes import Child
from tests.waiting import until
from turbofit.batch.batch_spec import BatchSpec
from turbofit.batch.folder_source import FolderSource
from turbofit.batch.launched import server_plan
from turbofit.core.errors import UsageError
from turbofit.launch.engine.image import flat_png
from turbofit.model.source import resolve_model
from turbofit.planning.request import PlanRequest


def photos(tmp_path, count: int = 3):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(flat_png(448, 448 + 8 * number))
    return folder


def planned(folder, request: PlanRequest, **spec):
    return server_plan(FolderSource(folder, "?", 16), BatchSpec.of(**spec), request, lambda _: None)


def test_the_options_promise_what_the_items_need(tmp_path) -> None:
    request = PlanRequest.of(model="internvl2-2b", on="1xrtx3090", enable_prefix_caching=False)
    found = planned(photos(tmp_path), request, pretend=True)
    words = list(found.options)
    assert words[:3] == ["internvl2-2b", "--on", "1xrtx3090"]
    assert words[words.index("--images") + 1] == "1"
    assert words[words.index("--image-size") + 1] == "448x448"
    assert int(words[words.index("--context") + 1]) == found.request.context
    assert words[-1] == "--pretend"
    assert "--no-enable-prefix-caching" in words


def test_a_limit_that_was_given_stays_and_shrinking_promises_no_size(tmp_path) -> None:
    request = PlanRequest.of(model="internvl2-2b", context=8192, max_dynamic_patch=4)
    given = {"shrink": True, "no_rehearse": True, "allowed_media_domains": ("x.org", "*.y.org")}
    words = planned(photos(tmp_path), request, **given).options
    assert "--image-size" not in words
    assert words[words.index("--context") + 1] == "8192"
    assert words[words.index("--max-dynamic-patch") + 1] == "4"
    assert words[-4:] == ("--allowed-media-domains", "x.org", "*.y.org", "--no-rehearse")


def test_a_model_that_another_process_cannot_read_is_said(tmp_path) -> None:
    request = PlanRequest.of(model=resolve_model("internvl2-2b"))
    with pytest.raises(UsageError, match="by its name"):
        planned(photos(tmp_path), request)


@pytest.mark.lmdeploy
@pytest.mark.slow
def test_lmdeploys_server_and_engine_may_die(tmp_path) -> None:
    """The engine is killed, then the whole server: every image has one answer in the end."""
    output = tmp_path / "out.jsonl"
    child = Child(
        [
            sys.executable, "-m", "turbofit", "batch", str(photos(tmp_path, 40)), str(output),
            "--model", "internvl2-2b", "--on", "1xrtx3090", "--pretend", "--prompt", "?",
            "--max-tokens", "8",
        ],
        standin=False,
        XDG_STATE_HOME=str(tmp_path / "state"),
        TURBOFIT_LEASES=str(tmp_path / "leases"),
    )  # fmt: skip
    try:
        engine = int(child.wait_for("(process ").partition("(process ")[2].partition(",")[0])
        child.wait_for("phase: ready")
        until(lambda: output.read_bytes().count(b"\n") >= 3, "three answers")
        os.kill(engine, signal.SIGKILL)
        child.wait_for("(process ", count=2)
        child.wait_for("phase: ready", count=2)
        os.kill(_server(child.process.pid), signal.SIGKILL)
        child.wait_for("starting it again")
        assert child.finish() == 0, child.stderr
    finally:
        child.kill()
    found = lines(output)
    assert len({one["custom_id"] for one in found}) == len(found) == 40
    assert not [one for one in found if one["error"]]


def _server(parent: int) -> int:
    """The process of ``turbofit serve``."""
    (found,) = (
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and _is_server(int(name), parent)
    )
    return found


def _is_server(pid: int, parent: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            ours = int(file.read().rpartition(")")[2].split()[1]) == parent
        with open(f"/proc/{pid}/cmdline") as file:
            return ours and "serve" in file.read().split("\0")
    except OSError:
        return False


def test_how_many_are_sent_at_once_is_no_promise_of_the_server(tmp_path) -> None:
    request = PlanRequest.of(model="internvl2-2b", on="1xrtx3090", concurrency=5000)
    found = planned(photos(tmp_path), request)
    assert "--concurrency" not in found.options
    assert found.request.concurrency == 5000
