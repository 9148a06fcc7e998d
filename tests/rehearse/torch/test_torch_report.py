"""A torch engine's document and how it is shown, from records and timelines written by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.rehearse.timelines import held_in
from turbofit.pretend.scenario import MIB, PretendGpu, Scenario
from turbofit.rehearse.torch.torch_report import torch_report
from turbofit.rehearse.torch.torch_spec import TorchSpec
from turbofit.report.painters.terminal import paint
from turbofit.report.views.run.torch_view import torch_view

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
ABOUT = {
    "model": {"name": "Some-VL-2B", "asked": "some", "twin": True},
    "machine": "1xsome",
    "given": {"cache_max_entry_count": 0.5},
    "worst_image": {"width": 448, "height": 896, "units": 2, "tokens": 512},
}


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
        {"name": "a", "requests": 1, "prompt_tokens": 500, "statuses": {"finished": 1}},
        {"name": "b", "requests": 4, "prompt_tokens": 16, "statuses": {"finished": 4}},
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
        told["afterwards"] = {"next_request": "unavailable", "words": "gone", "health": "healthy"}
        log = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB."
    shared = SimpleNamespace(
        processes=(), peak=(10250 * MIB,), pinned_peak=0, allocations=0, pinned_allocations=0
    )
    scenario = Scenario((PretendGpu("Some card", total=12000 * MIB, used=100 * MIB),))
    ran = SimpleNamespace(
        code=0, exit_code=0, seconds=9.0, command=(), shared=shared, scenario=scenario, usages=()
    )
    seen: Any = SimpleNamespace(
        spec=TorchSpec("pytorch", Path("x")), ran=ran, held=held_in(folder),
        records=[{"pid": 7, "number": 9, "rows": rows}], report=told, log=log, late=False,
    )  # fmt: skip
    return torch_report(seen, {"torch": "2.12.1", "lmdeploy": "0.18.0"}, ABOUT)


def test_a_start_in_parts_and_its_cases(tmp_path: Path) -> None:
    made = document(tmp_path)
    assert (made["outcome"], made["death"]) == ("served", None)
    (card,) = made["gpus"]
    assert card["contexts"] == 300 * MIB
    assert card["weights"]["requested"] == 3899 * MIB
    assert card["weights"]["held"] == 4000 * MIB
    assert card["cache"] == {"allocated": 5000 * MIB, "reserved": 5000 * MIB, "held": 5000 * MIB}
    assert card["warm-up"]["reserved"] == 100 * MIB
    assert card["after_start"]["left"] == (12000 - 100 - 300 - 9100) * MIB
    assert card["left_at_peak"] == (12000 - 100 - 10250) * MIB
    assert made["cache"]["tokens"] == 6400
    assert made["cache"]["bytes"] == [5000 * MIB]
    (first,) = made["cases"][0]["gpus"]
    assert first["held_peak"] == 10200 * MIB
    assert first["fragmentation"] == 100 * MIB
    assert first["left"] == (11900 - 10200) * MIB
    assert first["margin"] == first["left"] + first["fragmentation"]
    # The later case left less, as torch keeps what it reserved; the earlier one took more.
    assert made["cases"][1]["gpus"][0]["left"] < first["left"]
    assert made["decides"] == "a"


def test_it_is_shown(tmp_path: Path) -> None:
    text = paint(torch_view(document(tmp_path)), width=100)
    for word in ("Some-VL-2B", "PyTorch engine 0.18.0", "served", "100 blocks of 64 tokens",
                 "cache_max_entry_count=0.5", "448x896", "CUDA graphs", "a decides"):  # fmt: skip
        assert word in text


def test_a_death_is_shown_with_what_comes_after(tmp_path: Path) -> None:
    made = document(tmp_path, dies=True)
    assert made["outcome"] == "out_of_memory"
    assert made["decides"] == "b"
    text = " ".join(paint(torch_view(made), width=100).split())
    assert "it ended in case b" in text
    assert "Tried to allocate 640.00 MiB." in text
    assert "unavailable gone" in text
    assert "serves nobody" in text
