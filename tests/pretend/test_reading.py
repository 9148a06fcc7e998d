from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from turbofit.core.struct import decode, to_json
from turbofit.kernels.families import demangle
from turbofit.pretend.build import compiler
from turbofit.pretend.elf import Symbols, dynamic_symbols, short_name
from turbofit.pretend.libraries import ACCOUNT, PretendError, check_surface
from turbofit.pretend.scenario import PretendGpu, Scenario
from turbofit.pretend.usage import Event, TimelineReader, read_timeline
from turbofit.rehearse.packages import engine_library


def test_timeline_stops_at_zero_bytes_and_unfinished_lines(tmp_path: Path) -> None:
    path = tmp_path / "timeline"
    path.write_bytes(b"P case one image\nA 0 1 2 512 1024 9c @1f,2e\nF 9c 0\nA 0 1" + bytes(4096))
    assert list(read_timeline(path)) == [
        Event("P", ("case one image",), ()),
        Event("A", ("0", "1", "2", "512", "1024", "9c"), (0x1F, 0x2E)),
        Event("F", ("9c", "0"), ()),
    ]


def test_a_timeline_is_read_on_from_where_the_reading_stopped(tmp_path: Path) -> None:
    path = tmp_path / "timeline"
    reader = TimelineReader(path)
    path.write_bytes(b"P import\nF 9c 0\nP con" + bytes(4096))
    assert list(reader.new_events()) == [
        Event("P", ("import",), ()),
        Event("F", ("9c", "0"), ()),
    ]
    # What was read is not read again: it could be anything now.
    path.write_bytes(b"X" * 16 + b"P context\nF 1f 0\n" + bytes(4096))
    assert list(reader.new_events()) == [
        Event("P", ("context",), ()),
        Event("F", ("1f", "0"), ()),
    ]
    assert list(reader.new_events()) == []


def test_names_are_short() -> None:
    name = demangle("_ZN9turbomind9InternVit4Impl7ForwardEiRNS_4core9TensorMapE")
    assert name.startswith("turbomind::InternVit::Impl::Forward(")
    assert short_name(name) == "InternVit::Impl::Forward"
    assert short_name("void turbomind::gemm::Tune<int, A<B> >(int (*)(long)) const") == "gemm::Tune"
    assert demangle("cudaMalloc") == "cudaMalloc"


def test_symbols_of_our_own_library(libraries: Path) -> None:
    library = libraries / ACCOUNT
    found = {s.name: s for s in dynamic_symbols(library)}
    entry = found["pretend_pool_malloc"]
    assert entry.defined
    assert entry.function
    assert not found["mmap"].defined
    assert Symbols(library).name(entry.offset + 1) == "pretend_pool_malloc"
    assert Symbols(library).name(1) == "?"


def test_not_an_elf_file(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"MZ" + bytes(100))
    with pytest.raises(ValueError, match="ELF"):
        list(dynamic_symbols(path))


def test_a_new_entry_point_is_named(libraries: Path, tmp_path: Path) -> None:
    source, engine = tmp_path / "e.c", tmp_path / "_engine.so"
    source.write_text(
        "int cudaMalloc(void **, long); int cudaFromTheFuture(void); int cuNew(void);"
        "int f(void) { return cudaMalloc(0, 1) + cudaFromTheFuture() + cuNew(); }"
    )
    subprocess.run([*compiler(), "-shared", "-fPIC", source, "-o", engine], check=True)
    with pytest.raises(PretendError, match="cuNew, cudaFromTheFuture"):
        check_surface(engine, libraries)


@pytest.mark.lmdeploy
def test_the_wheel_imports_nothing_that_we_lack(libraries: Path) -> None:
    check_surface(engine_library(), libraries)
    asked = {symbol.name for symbol in dynamic_symbols(engine_library()) if not symbol.defined}
    assert {"cudaMallocFromPoolAsync", "cuMemCreate", "cublasGemmEx", "ncclMemAlloc"} <= asked


def test_what_older_wheels_import_is_there(libraries: Path) -> None:
    """Of 0.16 and 0.17, which `scripts/new-lmdeploy` compares with."""
    there = {
        symbol.name
        for name in ("libcublas.so.12", "libcudart.so.12")
        for symbol in dynamic_symbols(libraries / name)
        if symbol.defined
    }
    assert there >= {
        "cublasGemmGroupedBatchedEx", "cublasSetMathMode", "cudaOccupancyMaxPotentialClusterSize",
    }  # fmt: skip


def test_scenario_text_has_everything() -> None:
    scenario = msgspec.convert(
        {
            "gpus": [
                {
                    "name": "NVIDIA  GeForce\nRTX 3090",
                    "total": 1000,
                    "used": 10,
                    "sm": [8, 6],
                    "sm_count": 82,
                    "l2": 6291456,
                }
            ]
            * 2,
            "peers": [[0, 1]],
            "extra": 512,
        },
        Scenario,
    )
    assert decode(to_json(scenario), Scenario, what="scenario") == scenario
    lines = scenario.text("/t").splitlines()
    assert "device 1000 10 0 8 6 82 6291456 102400 101376 NVIDIA GeForce RTX 3090" in lines
    assert "peer 0 1" in lines
    assert "peer 1 0" not in lines
    assert "extra 512" in lines
    assert "timeline /t" in lines


def test_unknown_capability_is_an_error_with_a_hint() -> None:
    with pytest.raises(PretendError, match=r"compute capability 6\.1"):
        Scenario((PretendGpu("GTX 1080", total=1, sm=(6, 1)),)).text("/t")
