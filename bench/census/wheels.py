"""``python -m bench.census.wheels [--write] [VERSION…]``: the kernels in LMDeploy's wheels.

Takes each release from 0.6 on from the package registry (about 0.1 GB each, nothing is kept), reads
the device code of TurboMind's library, and prints what each release changed. ``--write`` renews
`presets/engines/kernels/` and `RESULTS.md`. ``--cuobjdump PATH`` compares the names of the kernels
with those that NVIDIA's program lists (Triton's package carries one).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from bench.census.files import Release, write
from turbofit.kernels.census import take_census
from turbofit.kernels.device_code import entries, functions

#: Releases whose libraries are known by their hashes: those that `turbofit serve` launches.
_SERVED = (0, 16, 0)
_PYTHONS = ("3.10", "3.11", "3.12", "3.13")
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
_FIRST = (0, 6, 0)


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.census.wheels", description=__doc__)
    parser.add_argument("versions", nargs="*", help="releases; all from 0.6 on by default")
    parser.add_argument("--write", action="store_true", help="renew the presets and RESULTS.md")
    parser.add_argument("--cuobjdump", type=Path, help="NVIDIA's program, to compare with")
    args = parser.parse_args(argv)
    releases = []
    for version in args.versions or _versions():
        release = _release(version, args.cuobjdump)
        print(
            f"{version}: {', '.join(release.census.architectures)}; {release.seconds:.1f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        releases.append(release)
    page = write(releases, keep=args.write)
    print(page)
    return 0


def _versions() -> list[str]:
    """The releases from 0.6 on, oldest first; of a patch and its ``post``s the last one."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "lmdeploy"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    line = next(line for line in told.splitlines() if line.startswith("Available versions:"))
    found: dict[tuple[int, ...], str] = {}
    for version in reversed(line.partition(":")[2].replace(" ", "").split(",")):
        found[tuple(map(int, re.findall(r"\d+", version)[:3]))] = version
    return [version for numbers, version in sorted(found.items()) if numbers >= _FIRST]


def _release(version: str, cuobjdump: Path | None) -> Release:
    served = tuple(map(int, re.findall(r"\d+", version)[:3])) >= _SERVED
    hashes, census, seconds = [], None, 0.0
    for python in _PYTHONS if served else _PYTHONS[:1]:
        with tempfile.TemporaryDirectory() as folder:
            library, digest = _library(version, python, Path(folder))
            hashes.append(digest)
            if census is None:
                began = time.perf_counter()
                census = take_census(library)
                seconds = time.perf_counter() - began
                if cuobjdump is not None:
                    _compare(library, cuobjdump)
    assert census is not None
    return Release(version, census, tuple(hashes) if served else (), seconds)


def _library(version: str, python: str, folder: Path) -> tuple[Path, str]:
    """TurboMind's library out of a wheel, and the hash that the wheel's RECORD has of it."""
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
         "--only-binary", ":all:", "--python-version", python, *platforms,
         f"lmdeploy=={version}", "--dest", str(folder)],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if "/_turbomind." in name)
        record = next(name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
        lines = wheel.read(record).decode().splitlines()
        digest = next(line.split(",")[1] for line in lines if line.startswith(f"{name},"))
        return Path(wheel.extract(name, folder)), digest.removeprefix("sha256=")


def _compare(library: Path, cuobjdump: Path) -> None:
    """Assert that NVIDIA's program lists no kernel that is not found."""
    told = subprocess.run(
        [cuobjdump, "--dump-elf-symbols", library], check=False, capture_output=True, text=True
    )
    if told.returncode:
        print(f"  {told.stderr.strip().splitlines()[-1][:80]}", file=sys.stderr, flush=True)
        return
    ours = {
        (architecture, function.name)
        for architecture, cubin in entries(library)
        if cubin is not None
        for function in functions(cubin)
    }
    theirs = set(_listed(told.stdout))
    missing = theirs - ours
    assert not missing, f"{len(missing)} kernels of cuobjdump's {len(theirs)} are not found"
    print(f"  cuobjdump lists the same {len(theirs):,} kernels", file=sys.stderr, flush=True)


def _listed(told: str) -> Iterator[tuple[str, str]]:
    architecture = ""
    for line in told.splitlines():
        if line.startswith("arch = sm_"):
            architecture = line.removeprefix("arch = sm_").strip()
        elif "STO_ENTRY" in line:
            yield architecture, line.split()[-1]


if __name__ == "__main__":
    sys.exit(main())
