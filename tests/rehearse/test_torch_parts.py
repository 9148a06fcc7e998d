"""The parts of a torch engine's rehearsal that need no torch: cases, records, ledger, outcome."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rehearse.timelines import held_in
from turbofit.cli.main import main
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.images import PatchRule, TileRule
from turbofit.pretend.documents import dumped, loaded
from turbofit.rehearse.torch import torch_rehearsal, torch_run
from turbofit.rehearse.torch.phase_recorder import Phases, read_records
from turbofit.rehearse.torch.torch_death import outcome_and_death
from turbofit.rehearse.torch.torch_image_overlap import ServerRoom
from turbofit.rehearse.torch.torch_ledger import combined
from turbofit.rehearse.torch.torch_rehearsal import TorchRehearsal, rehearse_torch
from turbofit.rehearse.torch.torch_spec import LONGEST, TorchSpec
from turbofit.rehearse.torch.torch_worst import rehearsed_size, torch_cases

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056)


# ---------------------------------------------------------------- the worst request


@pytest.mark.parametrize("limit", range(1, 13))
def test_a_picture_gives_as_many_tiles_as_any(limit: int) -> None:
    size = rehearsed_size(TILES, limit)
    seen = TILES.units(*size, limit)
    assert seen == TILES.worst_units(limit)
    # The engine is not told of the limit: the picture keeps to it by itself.
    assert TILES.units(*size) == seen


@pytest.mark.parametrize("pixels", [12845056, 1003520, 602112, 100352, 3136])
def test_a_picture_gives_nearly_as_many_patches_as_any(pixels: int) -> None:
    size = rehearsed_size(PATCHES, pixels)
    seen, worst = PATCHES.units(*size), PATCHES.worst_units(pixels)
    assert 0.97 * worst <= seen <= worst


def test_qwen2_vls_worst_picture_is_a_square() -> None:
    assert rehearsed_size(PATCHES, None) == (3584, 3584)


def test_a_limit_above_the_checkpoints_own_is_refused() -> None:
    with pytest.raises(UsageError, match="checkpoint's own 12"):
        rehearsed_size(TILES, 24)


def test_the_cases_of_a_model_that_sees() -> None:
    cases = torch_cases(PATCHES, (3584, 3584), room=ServerRoom(batch=128, prefill=8192))
    assert [(case.name, len(case.requests)) for case in cases] == [
        ("vision_request", 1),
        ("vision_forward", 2),  # one of 16384 tokens is a forward of its own
        ("text_prefill", 1),
        ("sampling", 128),
    ]
    assert cases[2].requests[0].text_tokens == LONGEST
    assert cases[3].requests[0].top_k == 0


def test_a_picture_whose_rule_is_not_known_is_sent_as_often_as_it_may_meet() -> None:
    one, many = torch_cases(None, (448, 448), images=2, room=ServerRoom(8, 4096))[:2]
    assert one.requests[0].images == ((448, 448), (448, 448))
    assert many.requests == one.requests * (4096 // (2 * 576) + 2)


def test_the_cases_of_what_serves_one_at_a_time() -> None:
    assert [c.name for c in torch_cases(None, None)] == ["text_prefill"]
    cases = torch_cases(TILES, (448, 448))
    assert [c.name for c in cases] == ["vision_request", "text_prefill"]


def test_a_specification_survives_its_text() -> None:
    cases = torch_cases(TILES, (448, 896), room=ServerRoom(batch=4, prefill=8192))
    spec = TorchSpec("pytorch", Path("somewhere"), {"tp": 2}, cases)
    assert loaded(dumped(spec), TorchSpec) == spec


# ---------------------------------------------------------------- records and ledger


def test_a_phase_waits_for_living_processes_only(tmp_path: Path) -> None:
    phases = Phases(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"pid": gone.pid, "number": 0, "rows": [{"phase": "build", "gpu": 0}]}
    (tmp_path / "records" / "1.json").write_text(json.dumps(record))
    phases.enter("build  model")
    assert phases.name == "build model"
    assert (tmp_path / "phase").read_text() == "1 build model"
    assert read_records(tmp_path) == [record]


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
    held = held_in(tmp_path)
    order = ["import", "build", "ready", "case x"]
    assert [held[0].on(0, name, order).peak for name in order] == [0, 25, 5, 12]
    assert combined(held, 0, "build", order).peak == 525
    assert combined(held, 0, "build", order).end == 505
    assert combined(held, 0, "case x", order).peak == 512
    # A phase in which a process was not marked: what it held after the one before.
    assert held[0].on(0, "later", [*order, "later"]).end == 5


# ---------------------------------------------------------------- outcome

OOM = "CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has a total capacity of 23.70 GiB"


def seen(log: str = "", code: int = 0, *, late: bool = False, **told: Any) -> Any:
    shared = SimpleNamespace(
        processes=(), peak=(0,) * 16, pinned_peak=0, allocations=0, pinned_allocations=0
    )
    scenario = SimpleNamespace(gpus=(), context=0)
    ran = SimpleNamespace(
        code=code,
        shared=shared,
        scenario=scenario,
        usages=(),
        command=(),
        exit_code=code,
        seconds=1,
    )
    return SimpleNamespace(ran=ran, report=told, log=log, late=late)


def case(name: str, **statuses: int) -> dict[str, Any]:
    return {"name": name, "statuses": statuses}


def test_served_where_every_request_ended() -> None:
    # A prompt that the front end refuses is an answer, too.
    told = seen(done=True, cases=[case("a", finished=3), case("b", too_long=1)])
    assert outcome_and_death(told) == ("served", None)


def test_a_picture_that_the_cache_cannot_hold_is_not_served() -> None:
    refusing = case("vision_request", too_long=1) | {"words": "The request exceeds it."}
    outcome, death = outcome_and_death(
        seen(done=True, cases=[refusing, case("text_prefill", finished=1)])
    )
    assert outcome == "refused"
    assert death is not None
    assert death["phase"] == "case vision_request"
    assert death["message"] == "too_long: The request exceeds it."


def test_a_death_in_a_request_is_told_in_torchs_words() -> None:
    log = f"""Traceback (most recent call last):
  File "/x/site-packages/torch/nn/modules/module.py", line 1, in _call_impl
  File "/x/site-packages/lmdeploy/pytorch/models/qwen2_vl.py", line 483, in forward
  File "/x/site-packages/lmdeploy/pytorch/models/qwen2_vl.py", line 449, in forward
  File "/x/site-packages/torch/_ops.py", line 871, in __call__
torch.OutOfMemoryError: {OOM}
later lines"""
    after = {"next_request": "unavailable", "words": "", "health": "unhealthy"}
    outcome, death = outcome_and_death(
        seen(log, done=True, cases=[case("vision", unavailable=1)], afterwards=after)
    )
    assert outcome == "out_of_memory"
    assert death is not None
    assert death["phase"] == "case vision"
    assert death["message"] == OOM
    assert death["where"] == [
        "lmdeploy/pytorch/models/qwen2_vl.py:449 forward",
        "lmdeploy/pytorch/models/qwen2_vl.py:483 forward",
    ]
    assert death["afterwards"] == after


@pytest.mark.parametrize(
    ("kind", "message", "phase", "outcome"),
    [
        ("OutOfMemoryError", OOM, "build", "out_of_memory"),
        ("RuntimeError", "No enough gpu memory for kv cache.", "sizing", "out_of_memory"),
        ("AssertionError", "num_key_value_heads % tp", "build", "refused"),
        ("ValueError", "no such thing", "case x", "failed"),
        ("RuntimeError", "strange", "build", "failed"),
    ],
)
def test_a_death_before_any_request(kind: str, message: str, phase: str, outcome: str) -> None:
    error = {"type": kind, "message": message, "phase": phase, "frames": ["a.py:1 f"]}
    log = f"{kind}: {message}"
    found, death = outcome_and_death(seen(log, 1, error=error, phase="end"))
    assert found == outcome
    assert death is not None
    assert death["phase"] == phase
    assert message in death["message"]


def test_what_never_ended_is_a_hang() -> None:
    assert outcome_and_death(seen(done=True, cases=[case("x", **{"not finished": 1})]))[0] == "hang"
    assert outcome_and_death(seen(code=-9, late=True, phase="warm-up"))[0] == "hang"
    assert outcome_and_death(seen("Segmentation fault", -11, phase="warm-up"))[0] == "failed"


# ---------------------------------------------------------------- wrong use


def test_torch_without_cuda_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_run, "cuda_site", lambda: None)
    monkeypatch.setattr(torch_run.importlib.util, "find_spec", lambda _: object())
    words = ["rehearse", "qwen2-vl-2b", "--engine", "pytorch", "--on", "1xrtx3090"]
    assert main(words) == 7
    error = capsys.readouterr().err.splitlines()
    assert error[-2] == (
        "error: this Python's torch is no CUDA build, which rehearsing pytorch runs"
    )
    assert error[-1].startswith("hint: install torch")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch_run.importlib.util, "find_spec", lambda name: None if name == "ray" else object()
    )
    with pytest.raises(PackageError, match="ray is not installed"):
        torch_run.need_packages("pytorch", ray=True)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--engine", "pytorch", "--defaults", "--margin", "1GiB"], "--margin shapes a plan"),
        (["--engine", "pytorch", "--communicator", "nccl"], "--communicator is no option"),
        (["--engine", "pytorch", "--async", "1"], "--async is no option"),
        (["--engine", "transformers", "--tp", "2"], "--tp is no option"),
        (["--engine", "transformers", "--cache-max-entry-count", "0.5"], "--cache-max-entry-count"),
        (
            ["--engine", "turbomind", "--eager-mode"],
            "--eager-mode is no option of the turbomind engine",
        ),
        (["--engine", "pytorch", "--tp", "2"], "--tp 2 needs 2 equal GPUs"),
        (["--engine", "pytorch", "--defaults", "--tp", "2"], "--tp 2 needs 2 GPUs"),
        (["--keep", "x"], "--keep is for what is rehearsed without a plan"),
    ],
)
def test_options_that_mean_nothing_here(
    words: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rehearse", "qwen2-vl-2b", "--on", "1xrtx3090", *words]) == 2
    assert cause in capsys.readouterr().err


def test_a_folder_of_an_unknown_kind_wants_a_picture_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"architectures": ["StrangeForVision"], "model_type": "strange", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch_rehearsal, "need_packages", lambda *_, **__: {})
    scenario: Any = SimpleNamespace(gpus=(SimpleNamespace(name="x"),))
    with pytest.raises(UsageError, match="takes pictures") as error:
        rehearse_torch(TorchRehearsal(str(tmp_path), "pytorch"), scenario)
    assert "--image-size" in error.value.hint


def test_the_parent_imports_neither_torch_nor_lmdeploy() -> None:
    code = (
        "import sys; import turbofit.rehearse.torch.torch_rehearsal; "
        "import turbofit.report.views.run.torch_view; "
        "print(sorted({'torch', 'lmdeploy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_that_was_told_to_end_did_not_fail(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends turbofit ends its child: nothing was seen of the engine's own end."""
    ended = SimpleNamespace(code=-number, usages=())
    monkeypatch.setattr(torch_run, "run_pretend", lambda *_, **__: ended)
    scenario: Any = None
    with pytest.raises(KeyboardInterrupt):
        torch_run.run_torch(TorchSpec("pytorch", tmp_path), scenario)
