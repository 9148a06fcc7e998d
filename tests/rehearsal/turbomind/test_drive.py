"""LMDeploy's own TurboMind on pretend GPUs, against the figures of shared/facts/rehearsal.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal.conftest import Rehearse, mib
from turbofit.core.units import MIB
from turbofit.logs.answer import Diagnosis
from turbofit.logs.explain import diagnose

pytestmark = pytest.mark.lmdeploy


def pool(document: dict[str, Any], phase: str) -> float | None:
    return mib(document["gpus"][0]["pools"]["executor"]["live_peak"][phase])


@pytest.mark.exhaustive
def test_cuda_ipc_without_peer_access_dies_as_the_driver_fails_it(run: Rehearse) -> None:
    document = run("internvl2-8b", tp=2, communicator="cuda-ipc", machine={"peers": []})
    assert document["outcome"] == "failed"
    assert "invalid device ordinal" in document["death"]["where"]
    assert document["death"]["phase"] == "context"


@pytest.mark.exhaustive
def test_sinks_of_another_type_end_the_first_request(run: Rehearse) -> None:
    """gpt-oss on a card without bfloat16: it starts, and aborts in its attention."""
    card = {"sm": [7, 0], "name": "Tesla V100-SXM2-32GB", "total": 32491 * MIB}
    cases = [{"name": "text", "requests": [{"text_tokens": 20}]}]
    document = run("gpt-oss-20b", session_len=16384, cases=cases, card=card)
    assert document["death"]["phase"] == "case text"
    assert "f16 vs. bf16" in document["death"]["where"]


def diagnosed(folder: Path, model: str, *, tp: int = 1, ratio: float = 0.8) -> Diagnosis:
    """What the log of a rehearsal that was kept in a folder is diagnosed as."""
    command = (
        f"$ lmdeploy serve api_server {model} --tp {tp} --max-batch-size 128 --session-len 32768 "
        f"--max-prefill-token-num 8192 --cache-max-entry-count {ratio}\n"
    )
    log = command.encode() + (folder / "log").read_bytes()
    return diagnose([log], on=f"{tp}xrtx3090:total=24268MiB:used=300MiB")


def missing_in_all(found: Diagnosis) -> int:
    assert found.missing_in_all is not None
    assert found.missing_in_all.bytes is not None
    return found.missing_in_all.bytes


@pytest.mark.exhaustive
def test_a_phones_photo_kills_qwen2_vl(run: Rehearse, tmp_path: Path) -> None:
    cases = [
        {"name": str(g), "requests": [{"units": [[1, g, g]], "text_tokens": 32}]}
        for g in (100, 160, 256)
    ]
    document = run("qwen2-vl-7b", cases=cases, keep=tmp_path)
    assert document["outcome"] == "out_of_memory"
    death = document["death"]
    wanted = {"phase": "case 256", "where": "QwenVit::Impl::Attn", "asked": 512 * MIB}
    assert {name: death[name] for name in wanted} == wanted
    assert death["missing"] > 0
    assert document["ended"] == "signal SIGABRT"
    assert "CUDA error: out of memory" in "\n".join(document["log"])
    assert [c["name"] for c in document["cases"]] == ["100", "160"]
    assert [pool(document, f"case {g}") for g in (100, 160)] == [284.73, 728.91]
    assert mib(document["gpus"][0]["load_peak"]) == pytest.approx(16064 + 3120, abs=4)
    found = diagnosed(tmp_path, "qwen2-vl-7b")
    assert found.phase == "vision"
    assert missing_in_all(found) >= death["missing"]
    assert "of the executor's pool" in found.why[-1]


@pytest.mark.exhaustive
def test_a_death_in_the_warm_up_lacks_in_all_what_the_timeline_says(
    run: Rehearse, tmp_path: Path
) -> None:
    document = run("internvl2-1b", tp=2, cache_max_entry_count=0.992, keep=tmp_path)
    assert document["outcome"] == "out_of_memory"
    found = diagnosed(tmp_path, "internvl2-1b", tp=2, ratio=0.992)
    assert (found.kind, found.phase) == ("out_of_memory", "warm-up")
    assert missing_in_all(found) >= document["death"]["missing"]
    assert found.would_work is not None
    assert found.would_work.fits
