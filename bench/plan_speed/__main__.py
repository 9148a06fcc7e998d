"""Cold time of a plan beside hf-mem and accelerate. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.page import ran_on, table

RUNS = 20
MODEL = "OpenGVLab/InternVL2-8B"
KNOWN = "Qwen/Qwen2.5-7B-Instruct"  # accelerate needs an architecture that Transformers has
COMMIT = "0" * 40
LIBRARY = ["--library_name", "transformers"]

# hf-mem has its hub's address built in: this sends its client to the stand-in.
HF_MEM = """
import sys, httpx2
get = httpx2.AsyncClient.get
def here(self, url, **kw):
    return get(self, str(url).replace("https://huggingface.co", HUB), **kw)
httpx2.AsyncClient.get = here
from hf_mem.cli import main
main()
"""


# What it estimates needs no torchvision, whose build for CUDA does not import beside CPU torch.
ACCELERATE = """
import sys
sys.modules["torchvision"] = None
sys.argv[0] = "accelerate"
from accelerate.commands.accelerate_cli import main
main()
"""


class Hub(SimpleHTTPRequestHandler):
    """What hf-mem and accelerate ask of a hub: file list, model info, a file or a part of one."""

    folders: dict[str, Path]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        folder = next((f for name, f in self.folders.items() if name in self.path), None)
        if folder is None:
            self._send(404, b"{}")
            return
        if self.path.startswith("/api/models/"):
            names = [p.name for p in folder.iterdir()]
            if "/tree/" in self.path:
                answer = [{"type": "file", "path": name} for name in names]
                self._send(200, json.dumps(answer).encode())
                return
            info = {
                "id": folder.name, "sha": COMMIT, "library_name": "transformers",
                "config": json.loads((folder / "config.json").read_text()),
                "siblings": [{"rfilename": name} for name in names],
            }  # fmt: skip
            self._send(200, json.dumps(info).encode())
            return
        file = folder / self.path.rsplit("/", 1)[-1]
        if not file.is_file():
            self._send(404, b"{}")
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        with file.open("rb") as stream:
            stream.seek(int(first))
            data = stream.read(int(last) - int(first) + 1 if last else -1)
        self._send(206 if "Range" in self.headers else 200, data)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{len(body)}-{self.path[-20:]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def make_whole(file: Path) -> None:
    """Give a header-only checkpoint its stated size, as a hole."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"]
        stream.truncate(8 + length + max(ends))


class Times(NamedTuple):
    """Seconds of some runs of one process."""

    wall: list[float]
    cpu: list[float]


def timed(jobs: dict[str, list[str]], env: dict[str, str]) -> dict[str, Times]:
    """All jobs in turn, `RUNS` times; the first round warms the file cache and is not counted."""
    times = {name: Times([], []) for name in jobs}
    for _ in range(RUNS + 1):
        for name, argv in jobs.items():
            start = time.perf_counter()
            child = subprocess.Popen(
                argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _, status, used = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                raise SystemExit(f"{argv}: exit {child.returncode}")
            times[name].wall.append(wall)
            times[name].cpu.append(used.ru_utime + used.ru_stime)
    return {name: Times(one.wall[1:], one.cpu[1:]) for name, one in times.items()}


def peak_mb(argv: list[str], env: dict[str, str]) -> float:
    """Peak resident size of one run, MB."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], check=True, env=env, capture_output=True, text=True
    )
    return int(done.stdout) / 1024


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.plan_speed", description=__doc__).parse_args()
    from turbofit.rehearse.checkpoint.twin import write_checkpoint

    python = sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        folder, known = Path(scratch) / "InternVL2-8B", Path(scratch) / "Qwen2.5-7B-Instruct"
        write_checkpoint("internvl2-8b", folder)
        write_checkpoint("qwen2.5-7b", known)
        for file in folder.glob("*.safetensors"):
            make_whole(file)
        served = {"folders": {MODEL: folder, KNOWN: known}}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), served))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        plan = [python, "-m", "turbofit", "plan"]
        on = ["--on", "4xrtx3090"]
        jobs = {
            "bare Python": [python, "-c", "pass"],
            "turbofit plan PRESET": [*plan, "internvl2-8b", *on],
            "turbofit plan FOLDER": [*plan, str(folder), *on],
            "hf-mem": [python, "-c", f"HUB = {hub!r}\n{HF_MEM}", "--model-id", MODEL],
        }
        if find_spec("accelerate") is not None:
            jobs["accelerate estimate-memory"] = [
                python, "-c", ACCELERATE, "estimate-memory", KNOWN, *LIBRARY,
            ]  # fmt: skip
        env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": scratch}
        rows = timed(jobs, env)
        sizes = {name: peak_mb(argv, env) for name, argv in jobs.items()}
        server.shutdown()
    report(rows, sizes)


def report(times: dict[str, Times], sizes: dict[str, float]) -> None:
    base = median(times["hf-mem"].cpu)
    rows = []
    for name, (wall, cpu) in times.items():
        each = (median(cpu), median(wall), min(wall), max(wall))
        milliseconds = (f"{one * 1000:.0f}" for one in each)
        rows.append((name, *milliseconds, f"{sizes[name]:.1f}", f"{each[0] / base:.2f}"))
    print(f"medians of {RUNS} cold runs, {ran_on()}\n")
    print(table("process | CPU ms | wall ms | min | max | peak MB | CPU of hf-mem", rows))


if __name__ == "__main__":
    main()
