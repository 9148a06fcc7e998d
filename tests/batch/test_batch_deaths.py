"""Batches that end before their time: killed, by a signal, on a full disk. They go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.batch.standin import StandIn, lines, write_requests
from tests.batch.test_batch_job import items, names
from tests.support.waiting import HANG, until

pytestmark = pytest.mark.slow


def test_kill_9_at_any_moment_loses_and_doubles_nothing(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", items(400))
    output, killed = tmp_path / "out.jsonl", 0
    with StandIn() as server:
        command = [
            sys.executable, "-m", "turbofit", "batch", str(source), str(output),
            "--url", server.url, "--concurrency", "8", "--quiet",
        ]  # fmt: skip
        for at in (1, 60, 200, 330):
            with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
                server.wait_for(at)
                child.send_signal(signal.SIGKILL)
                killed += child.wait(HANG) == -signal.SIGKILL
            with output.open("ab") as file:
                file.write(b'{"id":"batch_req_torn')
        assert killed >= 3
        subprocess.run(command, check=True, timeout=HANG)
        # Only what was under way at a kill was sent twice.
        assert len(server.bodies) <= 400 + 4 * 8
    assert sorted(names(output)) == sorted(items(400))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_in_order(number, tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", {**items(5), "held": "hold"})
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        command = [
            sys.executable, "-m", "turbofit", "batch", str(source), str(output),
            "--url", server.url, "--json",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            until(lambda: output.exists() and output.read_bytes().count(b"\n") == 5, "five lines")
            child.send_signal(number)
            out, _ = child.communicate(timeout=HANG)
    assert child.returncode == 130
    said = json.loads(out)
    assert (said["schema"], said["answered"], said["left"]) == ("turbofit.batch/1", 5, 1)


def test_a_disk_that_takes_no_more_ends_it_and_with_room_it_goes_on(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", items(60))
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        command = [
            sys.executable, "-m", "turbofit", "batch", str(source), str(output),
            "--url", server.url, "--quiet",
        ]  # fmt: skip
        limited = [
            sys.executable, "-c",
            "import os, resource, sys\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            "os.execv(sys.argv[1], sys.argv[1:])",
        ]  # fmt: skip
        done = subprocess.run(
            [*limited, *command], stderr=subprocess.PIPE, text=True, check=False, timeout=HANG
        )
        assert done.returncode == 2
        assert f"error: {output} cannot be written: File too large" in done.stderr
        assert "hint: make room" in done.stderr
        kept = len(lines(output))
        assert 0 < kept < 60
        assert output.read_bytes().endswith(b"\n")
        subprocess.run(command, check=True, timeout=HANG)
    assert sorted(names(output)) == sorted(items(60))
