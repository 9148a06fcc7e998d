"""What installed programs want of NVIDIA's libraries, and the libraries that are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turbofit.rehearsal.packages import engine_library
from turbofit.rehearsal.pretend.build import build, compiler
from turbofit.rehearsal.pretend.elf import dynamic_symbols, needed, needed_versions
from turbofit.rehearsal.pretend.libraries import (
    LibraryInterface,
    check_surface,
    wanted_from,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> Path:
    """Packages with one CUDA library, which wants two of NVIDIA's: one with a version, one not."""
    folder = tmp_path_factory.mktemp("site")
    made, kept = folder / "nvidia", folder / "torch" / "lib"
    made.mkdir()
    kept.mkdir(parents=True)
    (made / "fft.map").write_text("FFT_9 { global: *; };")
    sources = {
        "libcufft.so.12": "int cufftExecC2C(void) { return 1; } int cufftNew(void) { return 2; }",
        "libcurand.so.10": "int curandGenerate(void) { return 1; }",
    }
    for name, code in sources.items():
        (made / f"{name}.c").write_text(code)
        version = ["-Wl,--version-script=fft.map"] if "fft" in name else []
        cc("-shared", "-fPIC", f"-Wl,-soname,{name}", *version, f"{name}.c", "-o", name, at=made)
    (made / "c10.c").write_text(
        """int cufftExecC2C(void); int cufftNew(void);
        const char *looked_up = "cuMemNobodyWrote";
        int both(void) { return cufftExecC2C() + cufftNew(); }"""
    )
    cc(
        "-shared", "-fPIC", "c10.c", "-Wl,--no-as-needed", "libcufft.so.12", "libcurand.so.10",
        "-o", "../torch/lib/libc10_cuda.so", at=made,
    )  # fmt: skip
    for path in made.iterdir():
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def built(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries for these packages, and for one that wants a runtime of its own."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(site, folder / "site")
    (folder / "f.c").write_text("int cudaMalloc(void); int f(void) { return cudaMalloc(); }")
    (folder / "r.c").write_text("int cudaMalloc(void) { return 0; }")
    cc("-shared", "-fPIC", "-Wl,-soname,libcudart.so.13", "r.c", "-o", "libr.so", at=folder)
    cc("-shared", "-fPIC", "f.c", "-L.", "-lr", "-o", "site/torch/lib/libf.so", at=folder)
    return build(folder, folder / "site")


def cc(*words: str, at: Path) -> None:
    subprocess.run([*compiler(), *words], cwd=at, check=True, capture_output=True)


def test_names_and_versions_are_read(site: Path) -> None:
    library = site / "torch" / "lib" / "libc10_cuda.so"
    assert {"libcufft.so.12", "libcurand.so.10"} < set(needed(library))
    assert needed_versions(library)["libcufft.so.12"] == frozenset({"FFT_9"})
    assert wanted_from(site) == {
        "libcuda.so.1": LibraryInterface(frozenset({"cuMemNobodyWrote"})),
        "libcufft.so.12": LibraryInterface(
            frozenset({"cufftExecC2C", "cufftNew"}), frozenset({"FFT_9"})
        ),
        "libcurand.so.10": LibraryInterface(),
    }


def test_the_program_runs_on_what_is_built(site: Path, built: Path) -> None:
    fft = {s.name for s in dynamic_symbols(built / "libcufft.so.12") if s.defined}
    assert {"cufftExecC2C", "cufftNew"} <= fft
    assert (built / "libcuda.so").resolve() == built / "libcuda.so.1"
    code = (
        "import ctypes, sys; both = ctypes.CDLL(sys.argv[1]).both();"
        "driver = ctypes.CDLL('libcuda.so.1'); print(both, driver.cuMemNobodyWrote())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site / "torch" / "lib" / "libc10_cuda.so")],
        env={**os.environ, "LD_LIBRARY_PATH": str(built), "TURBOFIT_TRACE_STUBS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Libraries that compute say that they did; the driver says that it cannot.
    assert done.stdout.split() == ["0", "801"]
    assert "cufftExecC2C does nothing here" in done.stderr
    assert done.stderr.count("cuMemNobodyWrote does nothing here") == 1


def test_each_runtime_keeps_its_own_error(built: Path, tmp_path: Path) -> None:
    """TurboMind's and torch's share a process: torch must not find TurboMind's error."""
    scenario = tmp_path / "scenario"
    scenario.write_text("device 1000000 0 0 8 6 82 6291456 102400 101376 Card\n")
    code = (
        "import ctypes; a, b = (ctypes.CDLL(f'libcudart.so.{n}') for n in (12, 13));"
        "print(a.cudaSetDevice(7), b.cudaGetLastError(), a.cudaGetLastError())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(built),
             "TURBOFIT_PRETEND_SCENARIO": str(scenario)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["101", "0", "101"]


@pytest.mark.lmdeploy
def test_the_wheel_imports_nothing_that_we_lack(libraries: Path) -> None:
    check_surface(engine_library(), libraries)
    asked = {symbol.name for symbol in dynamic_symbols(engine_library()) if not symbol.defined}
    assert {"cudaMallocFromPoolAsync", "cuMemCreate", "cublasGemmEx", "ncclMemAlloc"} <= asked
