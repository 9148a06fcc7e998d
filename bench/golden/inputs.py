"""Writes the files that command lines read: machines, checkpoints, logs, plans and runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bench.golden.machines import MACHINES, MIB
from tests.support.safetensors_file import write_safetensors

HERE = Path(__file__).parent
#: Made by turbofit itself: each is the JSON that a command prints.
_PLANS = {
    "four-engines.json": "plan internvl2-8b --on 4xrtx3090",
    "mixed.json": "plan internvl2-8b --on unequal.json",
    "fallback.json": "plan llava-onevision-7b --on 2xrtx4090",
    "too-small.json": "plan internvl2-26b --on 1xrtx3060",
    "pytorch.json": "plan cogvlm-17b --on 2xrtx3090 --tp 2",
    "text-only.json": "plan qwen2.5-7b --on 1xrtx3090",
    "measured-plan.json": "plan internvl2-8b --on pairs.json --tp 2",
    "options.json": "plan qwen2-vl-7b --on four.json --tp 2 --images 2 --image-size 900x400 "
    "--context 8192 --concurrency 6 --goal latency --queue-images --max-pixels 1003520 "
    "--margin 1GiB --dtype float16 --quant-policy 8 --engine turbomind",
    "one-card.json": "plan qwen2-vl-7b --on 1xrtx3090",
}
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_inputs(folder: Path, run: Callable[[Sequence[str]], str]) -> None:
    """Write all inputs; ``run`` returns what turbofit prints for a command line."""
    for name, document in MACHINES.items():
        _write(folder / name, document)
    for name, text in _yaml("logs").items():
        (folder / name).write_text(text, encoding="utf-8")
    checkpoints = _yaml("checkpoints")
    for name, files in checkpoints.items():
        _checkpoint(folder / name, files)
    _damaged(folder, checkpoints["llama-plain"])
    _hub_cache(folder / "hf" / "hub", checkpoints)
    said = {name: run([*line.split(), "--json"]) for name, line in _PLANS.items()}
    for name, text in said.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "bad-plan.json").write_text('{"schema": "turbofit.plan/1"}')
    (folder / "plan.json").write_text("{}")
    # If turbofit refuses an input here, the documents that are made of it are missing, and differ.
    with suppress(KeyError, ValueError):
        _made_of_plans(folder, {name: json.loads(text) for name, text in said.items()})


def _made_of_plans(folder: Path, plans: dict[str, Any]) -> None:
    """Write rehearsed plans, a plan that contradicts itself, and runs."""
    one = plans["one-card.json"]
    _write(folder / "rehearsed.json", _rehearsed(one, dies=False))
    _write(folder / "died.json", _rehearsed(one, dies=True))
    _write(folder / "contradictory.json", {**one, "engines": one["engines"] * 2})
    _runs(folder, plans["four-engines.json"])


def _yaml(name: str) -> dict[str, Any]:
    found = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def _checkpoint(folder: Path, files: dict[str, Any]) -> None:
    """Write a checkpoint's JSON files, and its weights if ``tensors`` says which."""
    for name, content in files.items():
        if name != "tensors":
            _write(folder / f"{name}.json", content)
    kind = files.get("tensors")
    if kind is None:
        return
    tensors = dict(_llama(awq=kind == "awq"))
    if kind != "sharded":
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    _write(folder / "model.safetensors.index.json", {"weight_map": index})


def _llama(*, awq: bool) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield names, dtypes and shapes of Llama-3.1-8B's tensors."""
    hidden, inter, keys, vocab = 4096, 14336, 1024, 128256
    dtype = "F16" if awq else "BF16"
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }  # fmt: skip
    yield "model.embed_tokens.weight", (dtype, (vocab, hidden))
    yield "lm_head.weight", (dtype, (vocab, hidden))
    yield "model.norm.weight", (dtype, (hidden,))
    for layer in range(32):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (dtype, (hidden,))
        yield f"{prefix}.post_attention_layernorm.weight", (dtype, (hidden,))
        for name, (out, inner) in linears.items():
            if awq:
                yield f"{prefix}.{name}.qweight", ("I32", (inner, out // 8))
                yield f"{prefix}.{name}.qzeros", ("I32", (inner // 128, out // 8))
                yield f"{prefix}.{name}.scales", ("F16", (inner // 128, out))
            else:
                yield f"{prefix}.{name}.weight", (dtype, (out, inner))


def _damaged(folder: Path, files: dict[str, Any]) -> None:
    """Write checkpoints that are not JSON, end too early, or lack a shard."""
    for name in ("bad-json", "bad-header", "bad-shard"):
        _checkpoint(folder / name, {**files, "tensors": "sharded"})
    (folder / "bad-json" / "config.json").write_text('{"architectures": [')
    (folder / "bad-header" / "model-1.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00")
    (folder / "bad-shard" / "model-2.safetensors").unlink()


def _hub_cache(hub: Path, checkpoints: dict[str, Any]) -> None:
    """Write a hub cache: a whole snapshot, one without weights, one of a model with a preset."""
    config_only = {"config": checkpoints["mistral"]["config"]}
    for name, files in (
        ("example--tiny-llama", checkpoints["llama-plain"]),
        ("example--config-only", config_only),
        ("OpenGVLab--InternVL2-1B", checkpoints["internvl-chat"]),
    ):
        repository = hub / f"models--{name}"
        _checkpoint(repository / "snapshots" / _COMMIT, files)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(_COMMIT)


def _rehearsed(plan: dict[str, Any], *, dies: bool) -> dict[str, Any]:
    """Return a plan of one card as if it had been rehearsed, with a MiB more in each phase."""
    engine = plan["engines"][0]
    gpu = engine["ledgers"][0]
    most = gpu["total"] - gpu["reserved"] if dies else gpu["peak"]
    ends = {
        "weights": gpu["load_peak"], "cache": gpu["steady"] - 800 * MIB, "ready": gpu["steady"],
        "case vision_request": most,
    }  # fmt: skip
    timeline = [
        {"phase": phase, "peak": [end + MIB], "end": [end], "image": phase.startswith("case")}
        for phase, end in ends.items()
    ]
    case = {
        "name": "vision_request", "peak": [gpu["peak"] + MIB], "transient": [100 * MIB],
        "pinned": 32 * MIB,
    }  # fmt: skip
    death = {
        "phase": "case vision_request", "where": "QwenVit", "asked": 512 * MIB, "left": 200 * MIB,
    }  # fmt: skip
    cache = {
        "free": [9 << 30], "region": [engine["kv"]["region_bytes"]], "object_size": 1 << 20,
        "slab_size": 32 * MIB, "tokens": engine["kv"]["tokens"],
    }  # fmt: skip
    rehearsal = {
        "outcome": "out_of_memory" if dies else "served", "seconds": 12.5,
        "engine_version": "0.18.0", "cases": [] if dies else [case], "cache": cache,
        "death": death if dies else None, "not_known": ["cuda_context", "kernel_modules"],
        "timeline": timeline,
    }  # fmt: skip
    ledger = [
        {**term, "rehearsed": term["bytes"] + MIB}
        if term["term"] in ("weights.vision", "kv_cache", "vision_request")
        else term
        for term in gpu["terms"]
    ]
    seen = {**engine, "ledgers": [{**gpu, "terms": ledger}], "rehearsal": rehearsal}
    return {**plan, "engines": [seen], "fits": not dies}


def _runs(folder: Path, plan: dict[str, Any]) -> None:
    """Write folders of runs: one that served after a failed start, one that gave up."""
    before = plan["created"]
    ended = {"kind": "out_of_memory", "message": "GPU 1 ran out of memory", "hint": "lower it"}
    beside = [
        {"what": what, "forecast": forecast, "actual": actual, "gpu": gpu}
        for gpu in range(4)
        for what, forecast, actual in (
            ("steady", 24_838_458_573, 24_790_000_000), ("kv_cache", 7_721_713_664, 7_700_000_000),
        )
    ]  # fmt: skip
    tokens = {"what": "tokens", "forecast": 58624, "actual": 58432, "unit": "tokens"}
    engine = {
        "group": 0, "seconds": {"weights": 41.5, "cache": 0.4, "ready": 66.0},
        "beside": [*beside, tokens],
    }  # fmt: skip
    moments = [
        {"phase": "weights", "at": 3.0, "used": {str(gpu): 1_900_000_000 for gpu in range(4)}},
        {"phase": "ready", "at": 66.0, "used": {str(gpu): 24_790_000_000 for gpu in range(4)}},
    ]
    first = {
        "started": before, "number": 0, "why": "first", "ended": ended, "moments": moments[:1],
        "memory_back": True,
    }  # fmt: skip
    second = {
        "started": before, "number": 1, "why": "out of memory while loading", "engines": [engine],
        "changes": {"cache_max_entry_count": 0.88}, "moments": moments, "restarts": 1,
    }  # fmt: skip
    run = {
        "schema": "turbofit.run/1", "turbofit_version": plan["turbofit_version"],
        "started": before, "model": "InternVL2-8B", "lmdeploy": "0.18.0",
        "events": [{"at": before, "kind": "restart", "text": "engine 1 is started again"}],
    }  # fmt: skip
    url = "http://127.0.0.1:23333"
    records: dict[str, dict[str, Any]] = {
        "served": {
            "state": "ended", "ended": "SIGTERM", "urls": [url], "attempts": [first, second],
        },
        "failed": {"state": "failed", "ended": ended, "attempts": [first]},
        "too-new": {"state": "ended", "schema": "turbofit.run/9"},
    }  # fmt: skip
    for name, more in records.items():
        _write(folder / name / "run.json", {**run, **more})
        _write(folder / name / "plan.json", plan)
    _write(folder / "served" / "plan-1.json", plan)
