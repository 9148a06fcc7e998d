"""Do diagnoses of rehearsed deaths name the bytes that the timeline shows?

LMDeploy's real TurboMind starts on pretend GPUs with random settings until enough runs have died or
hung. Each run's own log, with the command that a person would paste in front of it, goes through
``turbofit diagnose``; what it says is missing is compared with the account of the machine.

    python -m bench.faults.diagnose_deaths [--deaths 30] [--seed 1] [--results DIAGNOSE_RESULTS.md]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from turbofit.core.units import MIB
from turbofit.diagnose.answer import Diagnosis
from turbofit.diagnose.explain import diagnose
from turbofit.memory.turbomind.constants import load_constants
from turbofit.memory.turbomind.weights import weight_classes
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.twin import write_checkpoint
from turbofit.rehearse.turbomind.probe import rehearse
from turbofit.rehearse.turbomind.spec import parse_spec

CARD = {"name": "NVIDIA GeForce RTX 3090", "sm": [8, 6], "sm_count": 82, "l2": 6 * MIB}
MODELS = (
    "internvl2-1b", "internvl2-2b", "internvl2-8b", "internvl2-8b-awq", "internvl2-26b-awq",
    "internvl3-8b", "qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen2.5-7b", "llama-3.1-8b",
    "qwen3-8b",
)  # fmt: skip
#: What is not known of a death in each phase: no line of the log tells it.
SILENT = ("weights", "configuration")


def config(draw: random.Random) -> dict[str, Any]:
    """Settings that leave little room: a death in the warm-up, at images, loading, or a hang."""
    name = draw.choice(MODELS)
    tp = 2 if "26b" in name else draw.choice((1, 1, 1, 2))
    model = resolve_model(name)
    weights = sum(weight_classes(model, tp, load_constants()).values()) // MIB
    batch = draw.choice((1, 8, 40, 128, 200, 256))
    prefill = draw.choice((1024, 2048, 4096, 8192, 12288))
    used = draw.randrange(0, 2000)
    total = max(24268, weights + 6000 + used)
    kind = draw.choices(("tight", "hang", "weights"), (10, 1, 1))[0]
    free = total - used - weights
    if kind == "weights":
        total = used + int(weights * draw.uniform(0.3, 0.99))
        ratio = 0.8
    elif kind == "hang":
        ratio = round(draw.uniform(0.001, 0.04), 3)
    else:
        ratio = round(max(0.05, 1 - draw.uniform(60, 900) / free), 3)
    return {
        "model": name,
        "tp": tp,
        "total": total,
        "used": used,
        "settings": {
            "tp": tp,
            "max_batch_size": batch,
            "max_prefill_token_num": prefill,
            "cache_max_entry_count": ratio,
            "session_len": draw.choice((8192, 16384, 32768)),
            "communicator": draw.choice(("nccl", "cuda-ipc")) if tp > 1 else "nccl",
        },
        "cases": cases(draw, model, name),
    }


def cases(draw: random.Random, model: Any, name: str) -> list[dict[str, Any]]:
    """Larger and larger images, so that one of them kills a run that has started."""
    if model.vision is None:
        return [{"name": "text", "requests": [{"text_tokens": 4000, "max_new_tokens": 2}]}]
    if "qwen" in name:
        sides = sorted(draw.sample(range(60, 250, 2), 3))
        units = [[1, side, side] for side in sides]
    else:
        units = sorted(draw.sample(range(6, 30), 3))
    return [
        {"name": str(one), "requests": [{"units": [one], "text_tokens": draw.randrange(16, 300)}]}
        for one in units
    ]


def command(chosen: dict[str, Any]) -> bytes:
    """The line that a person pastes above the log."""
    words = [f"--{key.replace('_', '-')} {value}" for key, value in chosen["settings"].items()]
    return f"$ lmdeploy serve api_server {chosen['model']} {' '.join(words)}\n".encode()


def run(chosen: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Diagnosis | None]:
    """Rehearse, and diagnose the log where it did not serve."""
    checkpoint = folder / chosen["model"]
    if not checkpoint.exists():
        write_checkpoint(chosen["model"], checkpoint)
    card = CARD | {"total": chosen["total"] * MIB, "used": chosen["used"] * MIB}
    spec = {
        "machine": {"gpus": [card] * chosen["tp"]},
        "model_dir": str(checkpoint),
        "settings": chosen["settings"],
        "cases": chosen["cases"],
    }
    keep = folder / "kept"
    document = rehearse(parse_spec(spec), keep)
    if document["outcome"] not in ("out_of_memory", "hang", "failed"):
        return document, None
    log = (keep / "stderr").read_bytes()
    # LMDeploy's own process would have printed what the rehearsal's child reports.
    log += str((document["error"] or {}).get("traceback", "")).encode()
    on = f"{chosen['tp']}xrtx3090:total={chosen['total']}MiB:used={chosen['used']}MiB"
    return document, diagnose([command(chosen), log], on=on)


def expected(document: dict[str, Any], settings: dict[str, Any]) -> tuple[str, int | None]:
    """Phase and bytes missing by the account of the pretend machine."""
    death = document["death"]
    if document["outcome"] == "hang":
        cache = document["cache"]
        tokens = settings["max_prefill_token_num"] + settings["max_batch_size"]
        tokens = -(-tokens // settings["tp"]) * settings["tp"]
        lengths = [n for n in load_constants().warmup_lengths if n <= tokens]
        longest = max(n for n in (*lengths, tokens) if n <= settings["session_len"])
        short = -(-longest // 64) - cache["tokens"] // 64
        return "start-up hang", short * cache["object_size"]
    phase = str(death["phase"])
    if document["outcome"] == "failed":
        return "configuration", None  # one of the engine's own checks
    if phase.startswith("case"):
        phase = "vision" if "Vit" in death["where"] else "text"
    elif phase in ("import", "context", "prepare"):
        phase = "weights"
    elif phase in ("buffers", "engine"):
        # A step of the executor's pool is of the warm-up's first request.
        phase = "warm-up" if death["pool"] == "executor" else "cache"
    elif phase == "ready":
        phase = "text"
    return phase, death.get("short")


def row(
    number: int, chosen: dict[str, Any], document: dict[str, Any], found: Diagnosis
) -> dict[str, Any]:
    """One line of the table."""
    phase, short = expected(document, chosen["settings"])
    said = found.missing.bytes if found.missing else None
    silent = phase in SILENT
    return {
        "number": number,
        "model": chosen["model"],
        "settings": chosen["settings"],
        "card": f"{chosen['total']} - {chosen['used']}",
        "outcome": document["outcome"],
        "phase": phase,
        "said_phase": found.phase,
        "short": short,
        "said": said,
        "all": found.missing_in_all.bytes if found.missing_in_all else None,
        "where": document["death"]["where"],
        "equal": said is None if silent else said == short,
        "right": phase == found.phase,
        "seconds": document["seconds"],
    }


def table(rows: list[dict[str, Any]], seed: int, tried: int, seconds: float) -> str:
    """What goes into the file of results."""
    silent = [one for one in rows if one["phase"] in SILENT]
    told = [one for one in rows if one not in silent]
    lines = [
        "# Diagnoses of rehearsed deaths",
        "",
        f"`python -m bench.faults.diagnose_deaths --deaths {len(rows)} --seed {seed}`: the real"
        f" TurboMind of LMDeploy 0.18 on pretend GPUs, {tried} random starts in {seconds:.0f} s on"
        f" 2 cores, {len(rows)} of which died or hung.",
        "",
        f"- phase named rightly: **{sum(one['right'] for one in rows)} of {len(rows)}**",
        f"- bytes missing equal to the machine's own account, to the byte, where the log allows"
        f" it: **{sum(one['equal'] for one in told)} of {len(told)}**",
        f"- deaths while loading or by one of the engine's checks, where its log has no size at"
        f" all: {len(silent)}; said to be unknown in {sum(one['equal'] for one in silent)}, with"
        " the whole load's shortage by formula beside it where it was loading",
        "",
        "Sizes in MiB; *missing* is what the failing allocation lacked (for a hang: cache for the"
        " missing blocks), *in all* what the whole step lacked, by the account.",
        "",
        "| # | model | tp | batch | prefill | session | ratio | card | phase | said | missing"
        " | said | in all | died in |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        s = one["settings"]
        lines.append(
            f"| {one['number']} | {one['model']} | {s['tp']} | {s['max_batch_size']}"
            f" | {s['max_prefill_token_num']} | {s['session_len']} | {s['cache_max_entry_count']}"
            f" | {one['card']} | {one['phase']} | {'' if one['right'] else '**'}{one['said_phase']}"
            f" | {mib(one['short'])} | {'' if one['equal'] else '**'}{mib(one['said'])}"
            f" | {mib(one['all'])} | {str(one['where'])[:40]} |"
        )
    return "\n".join([*lines, ""])


def mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / MIB:.3f}".rstrip("0").rstrip(".")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults.diagnose_deaths", description=__doc__
    )
    parser.add_argument("--deaths", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    begun, tried = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="turbofit-deaths-") as name:
        while len(rows) < args.deaths:
            chosen = config(draw)
            tried += 1
            document, found = run(chosen, Path(name))
            if found is None:
                print(f"({document['outcome']}: {chosen['model']})", flush=True)
                if document["outcome"] == "failed":
                    print(json.dumps(document["death"]), flush=True)
                continue
            rows.append(row(len(rows) + 1, chosen, document, found))
            print(json.dumps(rows[-1]), flush=True)
    section = table(rows, args.seed, tried, time.monotonic() - begun)
    print(section)
    if args.results:
        args.results.write_text(section, encoding="utf-8")
    return 0 if all(one["equal"] and one["right"] for one in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
