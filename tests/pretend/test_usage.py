from __future__ import annotations

from pathlib import Path

from turbofit.pretend.build import ACCOUNT
from turbofit.pretend.elf import dynamic_symbols
from turbofit.pretend.timeline import read_timeline
from turbofit.pretend.usage import Usage, read_usage


def usage(tmp_path: Path, *lines: str) -> Usage:
    path = tmp_path / "1.timeline"
    path.write_text("\n".join(lines) + "\n")
    return read_usage(read_timeline(path))


def test_peaks_phases_and_sites(tmp_path: Path) -> None:
    seen = usage(
        tmp_path,
        "I 7 3 1,0",
        "N python  train.py --x",
        "K 1 100 900 @",
        "P load weights",
        "A 1 0 -1 512 512 9c @",
        "A 1 3 -1 4096 4096 aa @",
        "S before.py:1",
        "P step",
        "A 1 1 0 1024 1536 9d @",
        "F 9c 1024",
        "S step.py:2 forward",
        "A 1 0 -1 200 1224 9f @",
        "S later.py:3",
        "R 1 0 0 200",
        "P end",
        "O 1 0 -1 9000 500 8500 @",
        "S big.py:9",
    )
    assert (seen.pid, seen.parent, seen.command) == (7, 3, "python  train.py --x")
    peak = seen.peaks[1]
    assert (peak.size, peak.phase, peak.site) == (1536, "step", "step.py:2 forward")
    assert seen.phases == {1: {"load weights": 512, "step": 1536, "end": 200}}
    assert seen.ends == {1: {"load weights": 512, "step": 200, "end": 200}}
    assert seen.contexts == {1: 100}
    (refusal,) = seen.refused
    assert (refusal.requested, refusal.left, refusal.short) == (9000, 500, 8000)
    assert (refusal.phase, refusal.site, refusal.kind) == ("end", "big.py:9", "cudaMalloc")


def test_a_native_trace_names_the_call(libraries: Path, tmp_path: Path) -> None:
    library = libraries / ACCOUNT
    at = next(s.offset for s in dynamic_symbols(library) if s.name == "pretend_pool_malloc")
    seen = usage(
        tmp_path, "I 7 3 0", f"L {library}", f"A 0 0 -1 512 512 9c @{at + 1:x}", "L nowhere.so",
        f"O 0 0 -1 9 5 9 @{at + 1:x}",
    )  # fmt: skip
    assert seen.peaks[0].site == "pretend_pool_malloc"
    assert seen.refused[0].site is None


def test_an_empty_timeline(tmp_path: Path) -> None:
    seen = usage(tmp_path)
    assert (seen.pid, seen.peaks, seen.refused) == (0, {}, [])
