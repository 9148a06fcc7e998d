"""The environment of a pretend machine, its libraries and timelines, what its processes used."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit.core.errors import MachineError
from turbofit.core.machine import Link
from turbofit.core.struct import NA, decode, to_json
from turbofit.machine.kernels.families import demangle
from turbofit.machine.source import machine_from
from turbofit.rehearsal.packages import engine_library
from turbofit.rehearsal.pretend.command import pretend_environment
from turbofit.rehearsal.pretend.elf import dynamic_symbols, short_name
from turbofit.rehearsal.pretend.libraries import ACCOUNT, PretendError, check_surface
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario, pretend_twin
from turbofit.rehearsal.pretend.usage import Event, TimelineReader, Usage, read_timeline, read_usage


def test_only_the_child_is_changed() -> None:
    base = {"PATH": "/bin", "LD_LIBRARY_PATH": "/opt", "CUDA_VISIBLE_DEVICES": "1", "TM_X": "1"}
    env = pretend_environment(Path("/lib"), Path("/scenario"), base)
    assert (env["LD_LIBRARY_PATH"], env["TURBOFIT_PRETEND_SCENARIO"]) == ("/lib:/opt", "/scenario")
    assert env["PATH"] == "/bin"
    assert not {"CUDA_VISIBLE_DEVICES", "TM_X", "LD_PRELOAD"} & env.keys()
    assert "CUDA_VISIBLE_DEVICES" in base
    # A user's own command keeps what changes memory.
    env = pretend_environment(Path("/lib"), Path("/s"), base, keep=True)
    assert env["TM_X"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_beside_a_cuda_build_of_torch_they_come_first(libraries: Path, tmp_path: Path) -> None:
    base = {"LD_PRELOAD": "/x.so", "PYTHONPATH": "/mine"}
    env = pretend_environment(libraries, Path("/s"), base, site=tmp_path)
    names = [Path(p).name for p in env["LD_PRELOAD"].split()]
    assert names[0] == "libturbofit_pretend.so"
    assert {"libcuda.so.1", "libcudart.so.12", "libnccl.so.2"} < set(names)
    assert names[-1] == "x.so"
    first, second = env["PYTHONPATH"].split(":")
    assert (Path(first) / "sitecustomize.py").exists()
    assert second == "/mine"


def test_the_twin_of_a_machine_that_is_known() -> None:
    links = (Link(a=1, b=3, p2p_read=True, p2p_write=True), Link(a=0, b=1, p2p_read=True))
    four = replace(machine_from("4xl4:used=100MiB"), links=links)
    scenario = pretend_twin(four, [3, 1, 0])
    first, gpu = scenario.gpus[0], four.gpus[3]
    assert (first.total, first.used) == (int(gpu.total) - int(gpu.reserved), gpu.used)
    assert scenario.peers == frozenset({(0, 1), (1, 0)})
    unread = replace(four, gpus=(replace(four.gpus[0], l2=NA),))
    with pytest.raises(MachineError, match="l2 is not known"):
        pretend_twin(unread, [0])
    with pytest.raises(MachineError, match="no GPU 5"):
        pretend_twin(unread, [5])


def usage(tmp_path: Path, *lines: str) -> Usage:
    path = tmp_path / "1.timeline"
    path.write_text("\n".join(lines) + "\n")
    return read_usage(read_timeline(path))


def test_phases_and_the_site_of_a_refusal(tmp_path: Path) -> None:
    seen = usage(
        tmp_path,
        "I 7 3 1,0",
        "N python  train.py --x",
        "K 1 100 900 @",
        "P load weights",
        "A 1 0 -1 512 512 9c @",
        "A 1 3 -1 4096 4096 aa @",
        "P step",
        "A 1 1 0 1024 1536 9d @",
        "F 9c 1024",
        "A 1 0 -1 200 1224 9f @",
        "R 1 0 0 200",
        "P end",
        "S before.py:1",
        "O 1 0 -1 9000 500 8500 @",
        "S big.py:9",
    )
    assert (seen.pid, seen.parent, seen.command) == (7, 3, "python  train.py --x")
    assert seen.phases == {1: {"load weights": 512, "step": 1536, "end": 200}}
    assert seen.ends == {1: {"load weights": 512, "step": 200, "end": 200}}
    assert seen.contexts == {1: 100}
    empty = usage(tmp_path)
    assert (empty.pid, empty.phases, empty.refused) == (0, {}, [])
    (refusal,) = seen.refused
    assert (refusal.requested, refusal.left, refusal.short) == (9000, 500, 8000)
    assert (refusal.phase, refusal.site, refusal.kind) == ("end", "big.py:9", "cudaMalloc")


def test_a_native_trace_names_the_call(libraries: Path, tmp_path: Path) -> None:
    library = libraries / ACCOUNT
    at = next(s.offset for s in dynamic_symbols(library) if s.name == "pretend_pool_malloc")
    seen = usage(
        tmp_path, "I 7 3 0", f"L {library}", f"O 0 0 -1 9 5 9 @{at + 1:x}", "L nowhere.so",
        f"O 0 0 -1 9 5 9 @{at + 1:x}",
    )  # fmt: skip
    assert [refusal.site for refusal in seen.refused] == ["pretend_pool_malloc", None]


def test_a_timeline_is_read_to_where_it_ends_and_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "timeline"
    reader = TimelineReader(path)
    # Zero bytes, or a line that is not finished, end it.
    path.write_bytes(b"P case one image\nA 0 1 2 512 1024 9c @1f,2e\nP con" + bytes(4096))
    first = [
        Event("P", ("case one image",), ()),
        Event("A", ("0", "1", "2", "512", "1024", "9c"), (0x1F, 0x2E)),
    ]
    assert list(read_timeline(path)) == list(reader.new_events()) == first
    # What was read is not read again: it could be anything now.
    path.write_bytes(b"X" * 44 + b"P context\nF 1f 0\n" + bytes(4096))
    assert list(reader.new_events()) == [Event("P", ("context",), ()), Event("F", ("1f", "0"), ())]
    assert list(reader.new_events()) == []


def test_names_are_short() -> None:
    name = demangle("_ZN9turbomind9InternVit4Impl7ForwardEiRNS_4core9TensorMapE")
    assert name.startswith("turbomind::InternVit::Impl::Forward(")
    assert short_name(name) == "InternVit::Impl::Forward"
    assert short_name("void turbomind::gemm::Tune<int, A<B> >(int (*)(long)) const") == "gemm::Tune"
    assert demangle("cudaMalloc") == "cudaMalloc"


@pytest.mark.lmdeploy
def test_the_wheel_imports_nothing_that_we_lack(libraries: Path) -> None:
    check_surface(engine_library(), libraries)
    asked = {symbol.name for symbol in dynamic_symbols(engine_library()) if not symbol.defined}
    assert {"cudaMallocFromPoolAsync", "cuMemCreate", "cublasGemmEx", "ncclMemAlloc"} <= asked


def test_scenario_text_has_everything() -> None:
    card = PretendGpu(
        "NVIDIA  GeForce\nRTX 3090", total=1000, used=10, sm=(8, 6), sm_count=82, l2=6291456
    )
    scenario = Scenario((card, card), peers=frozenset({(0, 1)}), fail_at=512)
    assert decode(to_json(scenario), Scenario, what="scenario") == scenario
    lines = scenario.text("/t").splitlines()
    named = "device 1000 10 0 8 6 82 6291456 102400 101376 NVIDIA GeForce RTX 3090"
    assert {named, "peer 0 1", "fail_at 512", "timeline /t"} <= set(lines)
    assert "peer 1 0" not in lines
    with pytest.raises(PretendError, match=r"compute capability 6\.1"):
        Scenario((PretendGpu("GTX 1080", total=1, sm=(6, 1)),)).text("/t")
