"""A torch engine's document, from records and timelines written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from turbofit.pretend.scenario import MIB, PretendGpu, Scenario
from turbofit.pretend.timeline import read_timeline
from turbofit.pretend.usage import read_usage
from turbofit.rehearse.document import report
from turbofit.rehearse.run import EndedRun
from turbofit.rehearse.spec import Spec
from turbofit.rehearse.torch.seen import seen

ORDER = (
    "import",
    "build",
    "sizing",
    "graph runner",
    "cache",
    "warm-up",
    "ready",
    "case a",
    "case b",
)


def row(phase: str, allocated: int, reserved: int, peak: int, reserved_peak: int) -> dict[str, Any]:
    return {
        "phase": phase,
        "gpu": 0,
        "requested": (allocated - 1) * MIB,
        "allocated": allocated * MIB,
        "reserved": reserved * MIB,
        "allocated_peak": peak * MIB,
        "reserved_peak": reserved_peak * MIB,
        "retries": 0,
    }


def document(folder: Path, *, dies: bool = False) -> dict[str, Any]:
    held, lines = 0, [f"I 7 1 0\nN python child\nK 0 {300 * MIB} 0"]
    for number, (phase, size) in enumerate(
        {"build": 4000, "cache": 9000, "warm-up": 9100, "case a": 9900, "case b": 9950}.items()
    ):
        more, held = size * MIB - held, size * MIB
        lines.append(f"P {phase}\nA 0 0 0 {more} {held} {number:x}")
    (folder / "7.timeline").write_text("\n".join(lines) + "\n")
    rows = [
        row("build", 3900, 4000, 3950, 4000),
        row("sizing", 3900, 4000, 3900, 4000),
        row("graph runner", 3900, 4000, 3900, 4000),
        row("cache", 8900, 9000, 8900, 9000),
        row("warm-up", 8920, 9100, 8990, 9100),
        row("ready", 8920, 9100, 8920, 9100),
        row("case a", 8930, 9900, 9800, 9900),
        row("case b", 8930, 9950, 9500, 9950),
    ]
    cases = [
        {"name": "a", "tokens": [500], "statuses": {"finished": 1}},
        {"name": "b", "tokens": [16] * 4, "statuses": {"finished": 4}},
    ]
    told: dict[str, Any] = {
        "seconds": dict.fromkeys(ORDER, 1.0),
        "cases": cases,
        "done": True,
        "cache": {
            "num_gpu_blocks": 100, "block_size": 64, "cache_max_entry_count": 0.5,
            "max_prefill_token_num": 8192, "max_batches": 128,
        },
        "free_at_sizing": [8000 * MIB],
        "block_bytes": [50 * MIB],
    }  # fmt: skip
    log = ""
    if dies:
        cases[1]["statuses"] = {"unavailable": 4}
        log = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB."
    shared = SimpleNamespace(
        processes=(), peak=(10250 * MIB,), pinned_peak=0, allocations=0, pinned_allocations=0
    )
    scenario = Scenario((PretendGpu("Some card", total=12000 * MIB, used=100 * MIB),))
    usages = [read_usage(read_timeline(path)) for path in folder.glob("*.timeline")]
    ran: Any = SimpleNamespace(
        code=0,
        exit_code=0,
        seconds=9.0,
        command=(),
        shared=shared,
        scenario=scenario,
        usages=usages,
    )
    (folder / "records").mkdir()
    record = {"pid": 7, "number": 9, "rows": rows}
    (folder / "records" / "7.json").write_text(json.dumps(record))
    ended = EndedRun(Spec(scenario, "x", "pytorch"), ran, told, log.splitlines(), "", folder)
    return report(ended, seen(ended), {"torch": "2.12.1", "lmdeploy": "0.18.0"})


def test_a_start_in_parts_and_its_cases(tmp_path: Path) -> None:
    made = document(tmp_path)
    assert (made["outcome"], made["death"]) == ("served", None)
    (card,), (terms,) = made["gpus"], made["terms"]
    assert card["contexts"] == 300 * MIB
    assert card["left_at_peak"] == (12000 - 100 - 10250) * MIB
    assert card["phases"]["cache"]["allocated"] == 8900 * MIB
    # Of the account, contexts included.
    assert card["phases"]["case a"]["peak"] == 10200 * MIB
    assert made["cases"][0]["peak"] == [10200 * MIB]
    assert made["cache"]["tokens"] == 6400
    assert made["cache"]["region"] == [5000 * MIB]
    assert terms == {
        "weights": 3899 * MIB,
        "load_fragmentation": 101 * MIB,
        "kv_cache": 5000 * MIB,
        "pool_warmup": 80 * MIB,  # what it keeps idle beyond the cache's
        "a": (9800 - 8930) * MIB,  # above what the first request left for good
        "b": (9500 - 8930) * MIB,
    }
    assert [case["transient"] for case in made["cases"]] == [[870 * MIB], [570 * MIB]]


def test_a_death_in_a_case(tmp_path: Path) -> None:
    made = document(tmp_path, dies=True)
    assert made["outcome"] == "out_of_memory"
    assert made["death"]["phase"] == "case b"
    assert made["death"]["message"] == "CUDA out of memory. Tried to allocate 640.00 MiB."
