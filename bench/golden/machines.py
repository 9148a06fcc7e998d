"""Machines as JSON, with facts that a SPEC cannot express; written without turbofit.

Such facts are memory in use, a host's shared memory and RAM, measured speeds, calibrations, and
GPUs that cannot be read. Nothing was measured: the figures are plausible and fixed.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
_RTX_3090 = ("NVIDIA GeForce RTX 3090", 24576, 308, (8, 6), 82, 6, 936e9, 71e12)
_RTX_4090 = ("NVIDIA GeForce RTX 4090", 24564, 439, (8, 9), 128, 72, 1008e9, 165e12)
_L4 = ("NVIDIA L4", 23034, 456, (8, 9), 58, 48, 300e9, 121e12)
_A100 = ("NVIDIA A100-SXM4-80GB", 81920, 603, (8, 0), 108, 40, 2039e9, 312e12)
_V100 = ("Tesla V100-SXM2-32GB", 32768, 262, (7, 0), 80, 6, 900e9, 112e12)


def _gpu(index: int, card: Any, used: int = 0, **changes: Any) -> dict[str, Any]:
    """A GPU as NVML shows it; ``used`` in MiB."""
    name, total, reserved, capability, sms, l2, bandwidth, flops = card
    holders = [{"pid": 4100 + index, "name": "python3", "bytes": used * MIB}] if used else []
    found = {
        "index": index, "uuid": f"GPU-00000000-0000-4000-8000-{index:012d}", "name": name,
        "total": total * MIB, "reserved": reserved * MIB, "used": used * MIB,
        "free": (total - reserved - used) * MIB, "compute_capability": list(capability),
        "sm_count": sms, "l2": l2 * MIB, "memory_bandwidth": int(bandwidth),
        "dense_flops": int(flops), "pcie": {"generation": 4, "width": 16}, "holders": holders,
    }  # fmt: skip
    return {**found, **changes}


def _box(
    name: str, gpus: list[dict[str, Any]], *, ram: int = 128, shm: int = 64 * 1024, **changes: Any
) -> dict[str, Any]:
    """A machine without peer access; ``ram`` in GiB, ``shm`` (shared memory) in MiB."""
    links = [
        {"a": a["index"], "b": b["index"], "p2p_read": False, "p2p_write": False, "nvlinks": 0,
         "ancestor": "hostbridge"}
        for a, b in combinations(gpus, 2)
    ]  # fmt: skip
    host = {"ram_total": ram * GIB, "ram_available": (ram - 4) * GIB, "shm_available": shm * MIB}
    found = {
        "schema": "turbofit.machine/1", "name": name, "source": "nvml", "gpus": gpus,
        "links": links, "host": {**host, "cpus": 16}, "driver": "560.35.03", "cuda": "12.6",
        "visible": [gpu["index"] for gpu in gpus],
    }  # fmt: skip
    return {**found, **changes}


def _alike(card: Any, count: int, used: int = 0) -> list[dict[str, Any]]:
    return [_gpu(index, card, used) for index in range(count)]


def _joined(box: dict[str, Any], nvlinks: int, *pairs: tuple[int, int]) -> dict[str, Any]:
    """Return the machine with NVLink between these pairs of GPUs, or by default between all."""
    joined = {
        "p2p_read": True, "p2p_write": True, "nvlinks": nvlinks,
        "nvlink_bandwidth": nvlinks * 25_000_000_000, "ancestor": "single",
    }  # fmt: skip
    links = [
        {**link, **joined} if not pairs or (link["a"], link["b"]) in pairs else link
        for link in box["links"]
    ]
    return {**box, "links": links}


def _measured(*groups: tuple[int, ...]) -> dict[str, Any]:
    """Return speeds of four cards and of all-reduces; cards 2 and 3 exchange wrong data."""
    pairs = [
        {
            "source": a, "target": b, "peer": {a, b} == {0, 1}, "right": {a, b} != {2, 3},
            "bandwidth": 2.6e10, "latency": 1.2e-5, "host_bandwidth": 1.1e10,
        }
        for a in range(4) for b in range(4) if a != b
    ]  # fmt: skip
    reduces = [
        {"gpus": gpus, "size": size, "seconds": 4e-5 * sum(gpus) + size / 9e9, "right": True}
        for gpus in groups
        for size in (65536, 16777216)
    ]
    cards = [{"index": i, "bandwidth": 8.1e11, "flops": 6.6e13} for i in range(4)]
    return {
        "torch": "2.8.0", "cards": cards, "pairs": pairs, "reduces": reduces,
        "left_out": ["all-reduce of 1,073,741,824 bytes over 0+1: no time left"],
    }  # fmt: skip


def _calibration(**changes: Any) -> dict[str, Any]:
    found = {
        "model": "InternVL2-8B (InternVLChatModel, 8075365376)", "engine": "turbomind",
        "engine_version": "0.18", "lmdeploy": "0.18.0", "gpus": [_RTX_3090[0]],
        "driver": "560.35.03", "communicator": "nccl", "when": "2026-11-20T08:00:00+00:00",
        "context": -64 * MIB, "buffers": 96 * MIB,
    }  # fmt: skip
    return {**found, **changes}


def _unreadable(index: int) -> dict[str, Any]:
    unread = dict.fromkeys(("total", "reserved", "used", "free"), "NA")
    return {**_gpu(index, _RTX_3090), **unread}


#: By file name.
MACHINES: dict[str, dict[str, Any]] = {
    "desk.json": _box("desk", _alike(_RTX_3090, 1, 1700), ram=32),
    "four.json": _box("four", [_gpu(i, _RTX_3090, (812, 0, 0, 5300)[i]) for i in range(4)]),
    "pairs.json": _joined(_box("pairs", _alike(_RTX_3090, 4)), 4, (0, 1), (2, 3)),
    "eight.json": _joined(_box("eight", _alike(_A100, 8), ram=1024), 12),
    "container.json": _box("container", _alike(_RTX_4090, 2), ram=24, shm=64),
    "little-ram.json": _box("little-ram", _alike(_A100, 2), ram=10),
    "unequal.json": _box(
        "unequal",
        [_gpu(0, _RTX_3090, 300), _gpu(1, _RTX_4090), _gpu(2, _L4, 8200), _gpu(3, _L4)],
    ),
    "old.json": _joined(_box("old", _alike(_V100, 4)), 2),
    "measured.json": _box(
        "measured", _alike(_RTX_3090, 4), measured=_measured((0, 1), (2, 3), (0, 1, 2, 3))
    ),
    "measured-pairs.json": _box(
        "measured-pairs", _alike(_RTX_3090, 4), measured=_measured(*combinations(range(4), 2))
    ),
    "calibrated.json": _box(
        "calibrated",
        _alike(_RTX_3090, 2),
        calibrations=[
            _calibration(),
            _calibration(gpus=[_RTX_3090[0]] * 2, communicator="nccl", context=128 * MIB),
            _calibration(engine="pytorch", buffers=-48 * MIB),
            _calibration(lmdeploy="0.17.0", driver="535.104.05"),
        ],
    ),
    "chosen.json": _box("chosen", _alike(_RTX_3090, 4), visible=[2, 1]),
    "slices.json": _box(
        "slices",
        [_gpu(i, _A100, total=20096 * MIB, reserved=37 * MIB, free=20059 * MIB, mig=True)
         for i in range(3)],
    ),
    "one-unread.json": _box("one-unread", [*_alike(_RTX_3090, 2), _unreadable(2)]),
    "all-unread.json": _box("all-unread", [_unreadable(0)]),
    "unknown-card.json": _box(
        "unknown-card",
        [_gpu(0, ("Some Card", 16384, 200, (8, 6), "NA", 4, 5e11, 4e13), sm_count="NA",
              memory_bandwidth="NA", dense_flops="NA", l2="NA", compute_capability="NA")],
    ),
    "bad-schema.json": {"schema": "turbofit.machine/9", "name": "x"},
    "bad-none.json": _box("none", []),
    "bad-twice.json": _box("twice", [_gpu(0, _L4), _gpu(0, _L4)], links=[]),
    "bad-full.json": _box("full", [_gpu(0, _L4, free=40 * GIB)]),
    "bad-visible.json": _box("visible", _alike(_L4, 1), visible=[3]),
}  # fmt: skip
