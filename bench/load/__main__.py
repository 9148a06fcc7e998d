"""Does `turbofit bench` measure what guidellm measures, on one paced server?

The server answers after 200 ms and then gives a token each 20 ms, whatever the load. guidellm is
another project's; name its command:

    python -m bench.load --guidellm "VENV/bin/guidellm" --write
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENS = 50
BAR = 0.03
#: A load's name, ours, guidellm's profile.
LOADS = (
    ("closed loop of 8", ("--concurrency", "8"), "kind=concurrent,streams=8"),
    ("closed loop of 32", ("--concurrency", "32"), "kind=concurrent,streams=32"),
    ("10 arrivals a second", ("--rate", "10", "--evenly"), "kind=constant,rate=10"),
)
FIGURES = (
    ("requests/s", ("requests_per_second",), "requests_per_second", 1.0),
    ("tokens/s", ("output_tokens_per_second",), "output_tokens_per_second", 1.0),
    ("TTFT, mean, s", ("ttft", "mean"), "time_to_first_token_ms", 1e-3),
    ("TPOT, mean, s", ("tpot", "mean"), "inter_token_latency_ms", 1e-3),
    ("E2E, mean, s", ("e2e", "mean"), "request_latency", 1.0),
)


def ours(url: str, options: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """What `turbofit bench` says."""
    command = [
        sys.executable, "-m", "turbofit", "bench", url, "--json", "--images", "0",
        "--prompt-tokens", "8", "--seconds", str(seconds), *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def theirs(command: list[str], url: str, profile: str, seconds: float) -> dict[str, Any]:
    """What guidellm says: the metrics of its report."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data.jsonl"), Path(folder, "out.json")
        rows = [{"prompt": f"number {i}", "output_tokens_count": TOKENS} for i in range(20000)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        subprocess.run(
            [
                *command, "run", "--backend", f"kind=openai_http,target={url},model=m",
                "--profile", profile, "--constraint", f"kind=max_duration,seconds={seconds:g}",
                "--data", f"kind=json_file,path={data}",
                "--output", f"kind=json,path={out}", "--disable-console",
            ],
            check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return json.loads(out.read_text())["benchmarks"][0]["metrics"]


def picked(document: dict[str, Any], path: tuple[str, ...]) -> float:
    """A figure of our document."""
    found: Any = document
    for name in path:
        found = found[name]
    return float(found)


def rows(command: list[str], seconds: float) -> list[tuple[str, str, float, float]]:
    """Load, figure, ours, guidellm's."""
    found = []
    with subprocess.Popen(
        [sys.executable, "-m", "bench.gateway.paced", "--port", "9301", "--tokens", str(TOKENS)],
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for name, options, profile in LOADS:
                a = ours(url, options, seconds)
                b = theirs(command, url, profile, seconds)
                for figure, path, key, scale in FIGURES:
                    mine, other = picked(a, path), b[key]["successful"]["mean"] * scale
                    found.append((name, figure, mine, other))
                    print(f"{name:22} {figure:15} {mine:9.4f} {other:9.4f} {mine / other - 1:+.1%}")
        finally:
            server.terminate()
    return found


def report(found: list[tuple[str, str, float, float]], seconds: float, version: str) -> str:
    """RESULTS.md."""
    worst = max(abs(mine / other - 1) for _, _, mine, other in found)
    lines = [
        "# `turbofit bench` beside guidellm",
        "",
        f"Made by `python -m bench.load --write` on {time.strftime('%Y-%m-%d')}: {version}, a",
        f"paced server ({TOKENS} tokens, the first after 200 ms, then one each 20 ms),",
        f"{seconds:g} s a load, 2 cores of an AMD EPYC with other work beside them.",
        "",
        f"The largest difference is **{worst:.1%}** (bar {BAR:.0%}). What guidellm calls",
        "inter-token latency is TPOT here and in vLLM: the time after the first token over the",
        "tokens after it. guidellm counts the answers that end within its duration and leaves out",
        "what is under way at its end, which makes its rates of a closed loop a little lower.",
        "",
        "| load | figure | turbofit bench | guidellm | difference |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {name} | {figure} | {mine:.4f} | {other:.4f} | {mine / other - 1:+.1%} |"
            for name, figure, mine, other in found
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """0 where the bar is met."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--guidellm", default="guidellm", help="its command")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    arguments = parser.parse_args()
    command = shlex.split(arguments.guidellm)
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    version = said.stdout.strip().replace(" version:", "").replace(", version", "")
    found = rows(command, arguments.seconds)
    if arguments.write:
        text = report(found, arguments.seconds, version)
        (HERE / "RESULTS.md").write_text(text)
    return int(any(abs(mine / other - 1) > BAR for _, _, mine, other in found))


if __name__ == "__main__":
    sys.exit(main())
