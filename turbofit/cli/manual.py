"""What `--help` says below a command's options: examples, exit codes, what the command touches."""

from __future__ import annotations

import textwrap
from typing import Final, NamedTuple

from turbofit.cli.terminal.output import PAGE_WIDTH

__all__ = ["EXIT_CODES", "MANUAL", "Manual", "manual_text"]

#: What each exit code means.
EXIT_CODES: Final[dict[int, str]] = {
    0: "done",
    1: "a bug in turbofit",
    2: "wrong use",
    3: "it would not serve: it does not fit, dies or hangs",
    4: "the machine cannot be read or has no GPU",
    5: "the engine could not be launched, or not be ended",
    6: "out of memory after all retries",
    7: "a needed package is missing or unsupported",
    130: "Ctrl-C",
}


class Manual(NamedTuple):
    """Of one command: example lines, exit codes besides 0, 1, 2 and 130, what it touches."""

    examples: tuple[str, ...]
    exits: tuple[int, ...]
    touches: str


_READS: Final = (
    "reads the model's config and the headers of its weights (a folder, the hub's cache, "
)
_HUB: Final = "or the hub itself) and, without --on, the GPUs through NVML; "
_KEEPS: Final = "keeps its answer for `report latest` in the state folder"

MANUAL: Final[dict[str, Manual]] = {
    "plan": Manual(
        (
            "turbofit plan internvl2-8b --on 4xrtx3090",
            "turbofit plan qwen2-vl-7b --on 1xl4:free=19GiB --images 2 --context 8192",
            "turbofit plan internvl2-8b --tp 4 --cache-max-entry-count 0.6 --json > plan.json",
        ),
        (3, 4, 7),
        f"{_READS}{_HUB}{_KEEPS}; with --rehearse what `rehearse` touches",
    ),
    "predict": Manual(
        (
            "turbofit predict internvl2-8b --on 4xrtx3090 --tp 4",
            "turbofit predict internvl2-8b --on 4xrtx3090 --tp 4 --free-at-cache 2780MiB",
            "turbofit predict internvl2-8b --on 4xrtx3090 --tp 4 --lmdeploy 0.6.4",
        ),
        (3, 4, 7),
        f"{_READS}{_HUB}{_KEEPS}",
    ),
    "rehearse": Manual(
        (
            "turbofit rehearse qwen2-vl-7b --on 1xrtx3090",
            "turbofit rehearse qwen2-vl-7b --on 1xrtx3090 --defaults",
            "turbofit rehearse qwen2-vl-2b --on 1xrtx3090 --engine pytorch --defaults --keep seen",
        ),
        (3, 4, 7),
        f"{_READS}{_HUB}builds its pretend libraries once in the cache folder; runs the engine in "
        f"a temporary folder; needs no GPU; {_KEEPS}",
    ),
    "pretend": Manual(
        (
            "turbofit pretend --on 2xrtx3090 -- python train.py",
            "turbofit pretend --on 1xrtx3090 --model internvl2-8b -- python pipeline.py",
            "turbofit pretend --on 1xl4:free=19GiB --watch -- lmdeploy serve api_server m",
        ),
        (4, 7),
        "builds its pretend libraries once in the cache folder; all else is what COMMAND does. Its "
        "output passes through untouched, the report goes to stderr, and the exit code is its own, "
        "128 + N where signal N killed it; values and speed are not real",
    ),
    "serve": Manual(
        (
            "turbofit serve internvl2-8b --tp 4",
            "turbofit serve internvl2-8b -d",
            "turbofit serve --plan plan.json --host 0.0.0.0 --api-key KEY",
            "turbofit serve internvl2-8b --on 1xrtx3090 --pretend",
            "turbofit serve internvl2-8b --cluster ray",
            "turbofit serve internvl2-8b -- --tool-call-parser qwen",
        ),
        (3, 4, 5, 6, 7),
        "takes memory of the GPUs, a public port and a private one an engine; downloads weights "
        "that are missing; keeps plan, record and logs of the run in the state folder; notes in "
        "/tmp/turbofit-leases which memory it counts on",
    ),
    "gateway": Manual(
        (
            "turbofit gateway --plan plan.json --upstream http://127.0.0.1:23334",
            "turbofit gateway --plan plan.json --upstream http://127.0.0.1:23334 --port 8000",
        ),
        (5, 7),
        "opens one port; sends requests to the engines; fetches remote images of allowed domains "
        "only; never reads the local disk for a client",
    ),
    "chat": Manual(
        (
            "turbofit chat",
            "turbofit chat http://10.0.0.7:8000 --system 'Answer in one sentence.'",
            "turbofit chat --max-tokens 200",
        ),
        (3,),
        "reads the pictures that a message names; sends them to the server, and nowhere else",
    ),
    "download": Manual(
        (
            "turbofit download internvl2-8b",
            "turbofit download OpenGVLab/InternVL2-8B --revision main",
        ),
        (5, 7),
        "writes into the cache of the hub that LMDeploy asks (HF_HOME, or MODELSCOPE_CACHE where "
        "LMDEPLOY_USE_MODELSCOPE is set); goes on where an earlier download ended",
    ),
    "tune": Manual(
        (
            "turbofit tune internvl2-8b",
            "turbofit tune qwen2-vl-7b --time 40m --slo ttft=2s,tpot=50ms --concurrency 32",
            "turbofit tune internvl2-8b --trace monday.jsonl --kv-types 0 --html tuned.html",
            "turbofit tune internvl2-2b --on 1xrtx3090 --pretend --starts 3 --seconds 5",
        ),
        (3, 4, 5, 6, 7),
        "starts engines one after the other, on private ports, and ends them; keeps its trials and "
        "its result in the state folder",
    ),
    "bench": Manual(
        (
            "turbofit bench",
            "turbofit bench http://10.0.0.7:8000 --concurrency 32 --images 2 --image-size 896x896",
            "turbofit bench --rate 4 --prompt-tokens 1024 --prompt-spread 0.5 --seconds 120 --json",
            "turbofit bench --trace monday.jsonl --html monday.html",
        ),
        (3, 7),
        "sends requests to URL, and keeps nothing; --html writes FILE",
    ),
    "batch": Manual(
        (
            "turbofit batch requests.jsonl answers.jsonl --url http://127.0.0.1:23333",
            "turbofit batch photos out.jsonl --model internvl2-8b --prompt 'What is this?'",
            "turbofit batch rows.csv out.jsonl --url http://10.0.0.7:8000 --prompt '{question}'",
            "turbofit batch requests.jsonl answers.jsonl --url http://10.0.0.7:8000 --retry-failed",
        ),
        (3, 4, 5, 6, 7),
        "reads INPUT and the images that it names; writes OUTPUT and, where items fail, "
        "OUTPUT.errors.jsonl; without --url what `serve` touches. 0 also where items failed: they "
        "have their lines; 3 where none was answered, or the server went away",
    ),
    "calibrate": Manual(
        (
            "turbofit calibrate internvl2-8b",
            "turbofit calibrate qwen2-vl-7b --tp 2 --minutes 20",
            "turbofit calibrate internvl2-2b --on 1xrtx3090 --pretend",
            "turbofit calibrate internvl2-8b --forget",
        ),
        (3, 4, 5, 6, 7),
        "starts the engines for minutes, on private ports, and ends them; keeps its steps and what "
        "it learned in the state folder",
    ),
    "cluster": Manual(
        (
            "turbofit cluster status",
            "turbofit cluster nodes --json > nodes.json",
            "turbofit cluster change --context 16384",
            "turbofit cluster drain gpu-node-7 --cluster ray:10.0.0.1:6379",
        ),
        (3, 4, 5, 7),
        "connects to Ray; `nodes` runs one short task on each node; `change` and `drain` ask the "
        "process of `turbofit serve --cluster`, which does it",
    ),
    "watch": Manual(
        (
            "turbofit watch",
            "turbofit watch --once --json",
            "turbofit watch 20261120-101500-InternVL2-8B --interval 5",
        ),
        (7,),
        "reads the run's record; asks its gateway for /metrics, and NVML",
    ),
    "ps": Manual(
        ("turbofit ps", "turbofit ps --json"), (), "reads the records of this user's runs"
    ),
    "logs": Manual(
        ("turbofit logs", "turbofit logs 20261120-101500-InternVL2-8B --lines 1000"),
        (),
        "reads the logs in the run's folder",
    ),
    "stop": Manual(
        ("turbofit stop", "turbofit stop InternVL2-8B --wait 600", "turbofit stop --all"),
        (5,),
        "sends SIGTERM to the server's process and waits for its end",
    ),
    "merge": Manual(
        (
            "turbofit merge llava-hf/llava-1.5-7b-hf my-lora merged",
            "turbofit merge liuhaotian/llava-v1.5-7b converted",
        ),
        (7,),
        "reads BASE and ADAPTER (folders, or the hub's cache); writes OUT, whole or not at all",
    ),
    "machine": Manual(
        ("turbofit machine", "turbofit machine --save box.json", "turbofit machine --measure"),
        (4, 7),
        "asks NVML and /proc; --save writes FILE; --measure takes memory of the GPUs for a minute "
        "and keeps what it found in the state folder",
    ),
    "report": Manual(
        (
            "turbofit report latest",
            "turbofit report plan.json --html report.html",
            "turbofit report 20261120-101500-InternVL2-8B --md",
            "turbofit report --schema",
        ),
        (3,),
        "reads a plan, or the state folder; --html writes FILE",
    ),
    "page": Manual(
        (
            "turbofit page",
            "turbofit page --out public --models internvl3-8b qwen3-vl-8b --cards rtx4090 l40s",
        ),
        (),
        "reads presets; writes index.html and the folder data in DIR",
    ),
    "init": Manual(
        (
            "turbofit init internvl2-8b --context 8192 --concurrency 16",
            "turbofit init qwen2-vl-7b --on 1xl4:free=19GiB --out l4.yaml",
            "turbofit init internvl2-8b --out - --least",
        ),
        (3, 4, 7),
        f"{_READS}{_HUB}writes the file that it names",
    ),
    "which": Manual(
        (
            "turbofit which internvl2-8b --images 2 --context 8192 --concurrency 16",
            "turbofit which qwen2-vl-7b --images-per-second 4 --html cards.html",
            "turbofit which --on 4xrtx3090",
        ),
        (3, 4, 7),
        f"{_READS}{_HUB.replace('without --on', 'without MODEL and --on')}keeps nothing",
    ),
    "compare": Manual(
        ("turbofit compare before.json after.json", "turbofit compare plan.json latest --md"),
        (),
        "reads two plans, or the state folder",
    ),
    "export": Manual(
        (
            "turbofit export systemd plan.json > vlm.service",
            "turbofit export compose internvl2-8b --on 2xrtx3090 > compose.yaml",
            "turbofit export k8s plan.json --claim hub-cache > vlm.yaml",
        ),
        (3, 4, 7),
        "reads the plan, or what `plan` reads of a model; prints, and starts nothing",
    ),
    "doctor": Manual(
        ("turbofit doctor", "turbofit doctor --model internvl2-8b --port 23333 --json"),
        (3, 4),
        "reads: NVML, /proc, packages, disks, whether a port is free; changes nothing",
    ),
    "diagnose": Manual(
        ("turbofit diagnose server.log", "turbofit diagnose - --model internvl2-8b --on 4xrtx3090"),
        (3, 4, 7),
        "reads the log, and the model as `plan` does; an unknown log exits with 3",
    ),
    "models": Manual(("turbofit models", "turbofit models --json"), (), "reads its own presets"),
    "gpus": Manual(
        ("turbofit gpus", "turbofit gpus 4090", "turbofit gpus --md"), (), "reads its own presets"
    ),
    "completion": Manual(
        (
            "turbofit completion bash > ~/.local/share/bash-completion/completions/turbofit",
            "turbofit completion zsh > ~/.zfunc/_turbofit",
            "turbofit completion fish > ~/.config/fish/completions/turbofit.fish",
        ),
        (),
        "prints, and changes no file of your shell; at each TAB the shell asks turbofit, which "
        "reads its own presets",
    ),
    "help": Manual(("turbofit help", "turbofit help serve"), (), "nothing"),
    "version": Manual(("turbofit version",), (), "nothing"),
}


def manual_text(name: str) -> str:
    """The lines below the options of a command; empty for one that has none."""
    if name not in MANUAL:
        return ""
    found = MANUAL[name]
    codes = sorted((0, 1, 2, *found.exits, 130))
    exits = "; ".join(f"{code} {EXIT_CODES[code]}" for code in codes)
    variables = f"each --option can be TURBOFIT_{name.upper()}_OPTION (docs/environment.md)"
    folded = [
        line
        for what, text in (
            ("environment", variables), ("exit codes", exits), ("touches", found.touches),
        )
        for line in _folded(f"{what}: {text}")
    ]  # fmt: skip
    return "\n".join(["", "examples:", *(f"  {one}" for one in found.examples), "", *folded, ""])


def _folded(text: str) -> list[str]:
    return textwrap.wrap(text, PAGE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
