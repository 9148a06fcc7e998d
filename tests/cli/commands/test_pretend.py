"""``turbofit pretend`` as people use it: a command in a process, its children, its death."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import gone
from tests.support.waiting import HANG
from turbofit.cli.main import main
from turbofit.core.units import MIB
from turbofit.planning.examine.packages import torch_cuda
from turbofit.planning.examine.scene import Sources

COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="no C compiler")]

PRELUDE = """
import ctypes, os, signal, subprocess, sys, time
MIB = 1 << 20
rt = ctypes.CDLL("libcudart.so.12")
account = ctypes.CDLL("libturbofit_pretend.so")
def malloc(mib):
    p = ctypes.c_void_p()
    return rt.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(int(mib * MIB)))
def free():
    a, b = ctypes.c_size_t(), ctypes.c_size_t()
    assert rt.cudaMemGetInfo(ctypes.byref(a), ctypes.byref(b)) == 0
    return a.value // MIB
def again(*words):
    return [sys.executable, sys.argv[0], *words]
def rest():
    while True:  # a signal just before one long sleep would be looked at after it
        time.sleep(0.1)
words = sys.argv[1:]
"""


@pytest.fixture
def program(tmp_path: Path) -> Any:
    """``program(code)``: the words that run a small program."""

    def write(code: str) -> tuple[str, str]:
        path = tmp_path / "prog.py"
        path.write_text(PRELUDE + textwrap.dedent(code))
        return sys.executable, str(path)

    return write


def words_of(*words: str) -> list[str]:
    return [sys.executable, "-m", "turbofit", "pretend", *words]


def pretend(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words_of(*words), capture_output=True, text=True, check=False, timeout=HANG
    )


def test_the_commands_own_words_and_end(program: Any, tmp_path: Path) -> None:
    own = "print('its answer'); print('its log', file=sys.stderr); malloc(1234); sys.exit(7)"
    kept = tmp_path / "kept"
    words = ["--on", "1xrtx3090", "--keep", str(kept), "--context", "0", "--"]
    done = pretend(*words, *program(own))
    assert (done.returncode, done.stdout) == (7, "its answer\n")
    assert done.stderr.splitlines()[0] == "PRETEND GPUs: values and speed are not real"
    assert "its log" in done.stderr
    assert "ended with exit code 7" in done.stderr
    assert json.loads((kept / "report.json").read_text())["gpus"][0]["peak"] == 1234 * MIB
    (timeline,) = (kept / "timelines").iterdir()
    assert timeline.stat().st_size < 4096
    again = pretend(*words, "true")
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_death_by_a_refused_allocation(program: Any) -> None:
    command = program(
        """
        account.pretend_mark(b"load"); malloc(3000)
        account.pretend_mark(b"run"); malloc(1000)
        code = malloc(30000); account.pretend_site(b"prog.py:9 image")
        if code: os.abort()
        """
    )
    done = pretend("--json", "--on", "1xrtx3090", "--context", "400MiB", "--", *command)
    seen = json.loads(done.stdout)
    assert (seen["exit_code"], seen["signal"], done.returncode) == (134, "SIGABRT", 134)
    (gpu,), (process,), refused = seen["gpus"], seen["processes"], seen["refused"]
    left = gpu["total"] - 4400 * MIB
    assert (gpu["peak"], gpu["left_at_peak"]) == (4400 * MIB, left)
    (row,) = process["gpus"]
    assert (row["context"], row["peak"], row["held_at_end"]) == (400 * MIB, 4000 * MIB, 4000 * MIB)
    assert row["phase"] == "run"
    assert row["phases"] == {"load": 3000 * MIB, "run": 4000 * MIB}
    assert (refused["asked"], refused["left"]) == (30000 * MIB, left)
    assert refused["short"] == 30000 * MIB - left
    place = (process["pid"], 0, "prog.py:9 image")
    assert (refused["pid"], refused["gpu"], refused["site"]) == place
    assert command[1] in refused["command"]
    text = pretend("--on", "1xrtx3090", "--", *command).stderr
    assert "killed by SIGABRT" in text
    assert "last refused: 29.3 GiB (cudaMalloc) on GPU 0" in text
    assert "prog.py:9 image" in text


def test_nothing_is_left_behind(program: Any, tmp_path: Path) -> None:
    """Orphans, even in sessions of their own and deaf to SIGTERM."""
    command = program(
        """
        if words:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open(words[0], "w").write(str(os.getpid())); print(flush=True); rest()
        for i in range(2):
            one = subprocess.Popen(
                again(f"{sys.argv[0]}.{i}"), start_new_session=bool(i), stdout=subprocess.PIPE
            )
            one.stdout.readline()
        """
    )
    assert pretend("--on", "1xl4", "--", *command).returncode == 0
    for i in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(f"{command[1]}.{i}").read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_command(program: Any, number: signal.Signals) -> None:
    command = program(
        """
        def told(number, _):
            print("told", number, flush=True); sys.exit(5)
        signal.signal(signal.SIGTERM, told); signal.signal(signal.SIGINT, told)
        print("up", flush=True); rest()
        """
    )
    with subprocess.Popen(
        words_of("--on", "1xl4", "--", *command),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out) == (5, f"told {int(number)}\n")
    assert "ended with exit code 5" in err


def test_wrong_use_is_said_in_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, cause in (
        (["--on", "1xl4"], "no command"),
        (["--", "true"], "--on SPEC is missing"),
        (["--on", "1xl4", "--", str(tmp_path / "missing")], "cannot be run"),
    ):
        assert main(["pretend", *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        error, hint = said.err.splitlines()[-2:]
        assert error.startswith("error: ")
        assert cause in error
        assert hint.startswith("hint: ")


def test_a_failure_beside_a_cpu_build_of_torch_names_the_build_to_install() -> None:
    for code, said in ((3, torch_cuda(Sources()) == ""), (0, False)):
        command = [sys.executable, "-c", f"raise SystemExit({code})"]
        words = words_of("--on", "1xrtx3060", "--", *command)
        ran = subprocess.run(words, capture_output=True, text=True, timeout=HANG, check=False)
        assert (ran.returncode, "without-gpu --pytorch" in ran.stderr) == (code, said)


def test_a_killed_turbofit_leaves_no_command_behind(program: Any) -> None:
    words = words_of("--on", "1xl4", "--", *program("print(os.getpid(), flush=True); rest()"))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)


def test_a_command_finds_a_model_without_its_weights() -> None:
    """A folder of its name; that `turbofit.pipeline` opens it: `serving/pipeline`, in --all."""
    code = (
        "import os, pathlib; folder = pathlib.Path(os.environ['TURBOFIT_PRETEND_TWIN']);"
        "print(folder.name, 'InternVLChatModel' in (folder / 'config.json').read_text(),"
        " any(folder.glob('*.safetensors')))"
    )
    done = pretend("--on", "4xrtx3090", "--model", "InternVL2-2B", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "InternVL2-2B True True\n"), done.stderr


def test_the_example_of_the_map_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    (example,) = re.findall(r"```sh\n(.*?)```", (root / "docs/pretend.md").read_text(), re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", example], cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "11 GiB fit\n")
    assert "last refused: 1.0 GiB (cudaMalloc)" in done.stderr
