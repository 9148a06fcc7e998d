"""A torch engine's cases, records and document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import turbofit.rehearsal.pretend
from tests.rehearsal.pretend.child import events_of
from turbofit.core.units import MIB
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import checkpoint_for
from turbofit.rehearsal.packages import INSIDE
from turbofit.rehearsal.planned import report
from turbofit.rehearsal.pretend.command import find_turbofit, put_first
from turbofit.rehearsal.pretend.process_memory import ProcessMemory
from turbofit.rehearsal.pretend.record import MachineRecord
from turbofit.rehearsal.pretend.run import FinishedRun
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.pretend.usage import Event
from turbofit.rehearsal.run import EndedRun
from turbofit.rehearsal.spec import Spec
from turbofit.rehearsal.torch.readings import end_of, read_run

ORDER = (
    "import", "build", "sizing", "graph runner", "cache", "warm-up", "ready", "case a", "case b",
)  # fmt: skip


def row(phase: str, allocated: int, reserved: int, peak: int) -> dict[str, Any]:
    """What torch counted in a phase; it reserved most at its end."""
    sizes = {
        "requested": allocated - 1, "allocated": allocated, "reserved": reserved,
        "allocated_peak": peak, "reserved_peak": reserved,
    }  # fmt: skip
    mib = {name: size * MIB for name, size in sizes.items()}
    return {"phase": phase, "gpu": 0, "retries": 0, **mib}


def document(folder: Path, *, dies: bool = False) -> dict[str, Any]:
    held, lines = 0, [f"I 7 1 0\nN python child\nK 0 {300 * MIB} 0"]
    for number, (phase, size) in enumerate(
        {"build": 4000, "cache": 9000, "warm-up": 9100, "case a": 9900, "case b": 9950}.items()
    ):
        more, held = size * MIB - held, size * MIB
        lines.append(f"P {phase}\nA 0 0 0 {more} {held} {number:x}")
    (folder / "7.timeline").write_text("\n".join(lines) + "\n")
    rows = [
        row("build", 3900, 4000, 3950),
        row("sizing", 3900, 4000, 3900),
        row("graph runner", 3900, 4000, 3900),
        row("cache", 8900, 9000, 8900),
        row("warm-up", 8920, 9100, 8990),
        row("ready", 8920, 9100, 8920),
        row("case a", 8930, 9900, 9800),
        row("case b", 8930, 9950, 9500),
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
    memories = [
        ProcessMemory(1, None, MIB).read(events_of(path)) for path in folder.glob("*.timeline")
    ]
    machine = MachineRecord(scenario, cast("Any", shared), tuple(memories))
    ran = FinishedRun((), 0, 9.0, machine)
    (folder / "records").mkdir()
    (folder / "records" / "7.json").write_text(json.dumps({"pid": 7, "number": 9, "rows": rows}))
    ended = EndedRun(Spec(scenario, "x", "pytorch"), ran, told, log.splitlines(), "", folder)
    return report(ended, read_run(ended), {"torch": "2.12.1", "lmdeploy": "0.18.0"})


def test_a_start_in_parts_its_cases_and_a_death_in_one(tmp_path: Path) -> None:
    made = document(tmp_path)
    assert (made["outcome"], made["death"]) == ("served", None)
    (card,), (terms,) = made["gpus"], made["terms"]
    assert (card["contexts"], card["left_at_peak"]) == (300 * MIB, (12000 - 100 - 10250) * MIB)
    assert card["phases"]["cache"]["allocated"] == 8900 * MIB
    # Of the account, contexts included.
    assert card["phases"]["case a"]["peak"] == 10200 * MIB
    assert (made["cases"][0]["peak"], made["cache"]["tokens"]) == ([10200 * MIB], 6400)
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
    dead = tmp_path / "dead"
    dead.mkdir()
    made = document(dead, dies=True)
    assert (made["outcome"], made["death"]["phase"]) == ("out_of_memory", "case b")
    assert made["death"]["message"] == "CUDA out of memory. Tried to allocate 640.00 MiB."


_PROGRAM = """
import sys
from lmdeploy import tokenizer
from lmdeploy.hf_configs import config_from_pretrained
from lmdeploy.serve.parsers import ResponseParserManager
from lmdeploy.utils import get_hf_gen_cfg

internvl, intern_s1_pro = sys.argv[1:]
assert config_from_pretrained(internvl, trust_remote_code=True).llm_config.hidden_size == 1024
assert get_hf_gen_cfg(intern_s1_pro, trust_remote_code=True)["eos_token_id"] == 2
assert tokenizer.GptOssTokenizer is tokenizer.HuggingFaceTokenizer
assert ResponseParserManager.get("gpt-oss") is ResponseParserManager.get("default")
"""


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_a_new_process_reads_stand_ins_of_families_with_code_of_their_own(tmp_path: Path) -> None:
    folders = [
        checkpoint_for(resolve_model(name), tmp_path / name)
        for name in ("internvl3.5-1b", "intern-s1-pro")
    ]
    env = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    put_first(env, "PYTHONPATH", str(INSIDE))
    find_turbofit(env)
    put_first(env, "PYTHONPATH", str(Path(turbofit.rehearsal.pretend.__file__).parent / "inside"))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, folders)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def timeline(folder: Path, pid: int, *lines: str) -> None:
    head = [f"I {pid} 1 0", f"N python worker{pid}"]
    (folder / f"{pid}.timeline").write_text("\n".join([*head, *lines]) + "\n")


def test_what_processes_hold_together(tmp_path: Path) -> None:
    timeline(
        tmp_path, 10,
        "K 0 300 900",
        "A 0 0 0 5 5 aa", "P build", "A 0 0 0 20 25 bb", "F bb 5", "P ready", "A 0 3 0 99 5 cc",
        "P case x", "A 0 0 0 7 12 dd", "F dd 5",
    )  # fmt: skip
    timeline(tmp_path, 11, "K 0 200 600")  # never marked: a context and no more
    paths = sorted(tmp_path.glob("*.timeline"))
    held = [ProcessMemory(1, None, MIB).read(events_of(path)).cards[0] for path in paths]

    def together(phase: str) -> tuple[int, int]:
        spans = [card.span(phase, order) for card in held]
        return sum(peak for peak, _ in spans), sum(end for _, end in spans)

    order = ["import", "build", "ready", "case x"]
    assert [held[0].span(name, order)[0] - 300 for name in order] == [0, 25, 5, 12]
    assert together("build") == (525, 505)
    assert together("case x")[0] == 512
    # A phase in which a process was not marked: what it held after the one before.
    assert held[0].span("later", [*order, "later"])[1] == 305


OOM = "CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has a total capacity of 23.70 GiB"


def death(log: str, *events: Event, **told: Any) -> dict[str, Any]:
    process = SimpleNamespace(pid=0, refused_at=1)
    memories = (ProcessMemory(1, None, MIB).read(events),)
    shared: Any = SimpleNamespace(processes=(process,))
    ran = FinishedRun((), 1, 0.0, MachineRecord(Scenario(()), shared, memories))
    ended: Any = SimpleNamespace(ran=ran, notes=told, log=log.splitlines())
    return end_of(ended)


def test_a_death_in_a_request_is_told_in_torchs_words_with_the_line_that_asked() -> None:
    log = f"torch.OutOfMemoryError: {OOM}\nlater lines"
    line = "aten.mm.default qwen2_vl.py:449 forward < qwen2_vl.py:483 forward"
    asked = Event("O", ("0", "0", "-1", str(640 * MIB), "4", "9"), ())
    found = death(
        log,
        asked,
        Event("S", (line,), ()),
        cases=[{"name": "vision", "statuses": {"unavailable": 1}}],
    )
    assert (found["kind"], found["phase"]) == ("out_of_memory", "case vision")
    assert (found["message"], found["where"]) == (OOM, line)
    assert (found["asked"], found["left"], found["missing"]) == (640 * MIB, 4, 5)


@pytest.mark.parametrize(
    ("kind", "message", "phase", "refused"),
    [
        ("OutOfMemoryError", OOM, "build", True),
        ("RuntimeError", "No enough gpu memory for kv cache.", "sizing", True),
        ("AssertionError", "num_key_value_heads % tp", "build", False),
        ("ValueError", "no such thing", "case x", False),
    ],
)
def test_a_death_before_any_request(kind: str, message: str, phase: str, refused: bool) -> None:
    error = {"type": kind, "message": message, "phase": phase, "frames": ["a.py:1 f"]}
    found = death(f"{kind}: {message}", error=error, phase="end")
    assert (found["kind"] == "out_of_memory") == refused
    assert found["phase"] == phase
    assert message in found["message"]


@pytest.mark.parametrize(
    ("kind", "message", "sized"),
    [
        ("AcceleratorError", "CUDA error: out of memory\nCUDA kernel errors might be late", False),
        ("RuntimeError", f"Caught in worker\n{OOM}", True),
    ],
)
def test_a_message_of_several_lines_is_read_by_line(kind: str, message: str, sized: bool) -> None:
    error = {"type": kind, "message": message, "phase": "build", "frames": ["a.py:1 f"]}
    found = death("", error=error)
    assert (found["kind"], "missing" in found) == ("out_of_memory", sized)
    assert message in found["message"]
