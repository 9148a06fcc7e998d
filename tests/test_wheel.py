"""What is built and installed: the wheel has all it needs; the lines of pages install it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from turbofit.rehearsal.pretend.elf import needed_versions

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
#: Without what would lead an interpreter to this checkout.
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def said(folder: Path, *words: str, **environ: str) -> str:
    """What a command prints that is run in a folder."""
    return subprocess.run(
        words, cwd=folder, env=ENVIRON | environ, check=True, capture_output=True, text=True
    ).stdout


def in_git(*parts: str) -> list[str]:
    """What git keeps of this checkout, and is there."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git here: an sdist")
    names = said(ROOT, "git", "ls-files", *parts).splitlines()
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
    said(ROOT, sys.executable, "-c", build, str(folder))
    return next(folder.glob("turbofit-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built of the sdist, as an index's users without a wheel would."""
    folder = sdist.parent
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    said(source, sys.executable, "-c", build, str(folder))
    return next(folder.glob("turbofit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """What pip makes of it, but for the script: it has one folder of files."""
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(target)
    return target


def test_the_sdist_has_all_that_git_has(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert set(in_git()) <= packed


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git keeps of the package, in a folder of its own."""
    parts = ("turbofit", "presets", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
    for name in in_git(*parts):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


HAS_COMPILER = sysconfig.get_platform() == "linux-x86_64" and any(
    map(shutil.which, ("cc", "gcc", "clang"))
)
LIBRARY = "turbofit/serving/images/libpixels.so"


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler, or no Linux on x86-64")
def test_the_wheel_has_the_compiled_library_and_names_its_platform(
    wheel: Path, installed: Path, tmp_path: Path
) -> None:
    assert wheel.stem.endswith("-py3-none-linux_x86_64")
    (tags,) = installed.glob("*.dist-info/WHEEL")
    assert {"Root-Is-Purelib: false", "Tag: py3-none-linux_x86_64"} <= set(
        tags.read_text().splitlines()
    )
    # What RELEASING's auditwheel then says of it: no newer glibc is needed.
    versions = needed_versions(installed / LIBRARY)
    assert set(versions) == {"libc.so.6"}
    numbers = [name.removeprefix("GLIBC_").split(".") for name in versions["libc.so.6"]]
    assert all((int(major), int(minor)) <= (2, 17) for major, minor, *_ in numbers)
    program = "from turbofit.core.installation import image_library; print(image_library())"
    found = said(tmp_path, sys.executable, "-c", program, PYTHONPATH=str(installed))
    assert found.strip() == str(installed / LIBRARY)


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_without_a_compiler_the_wheel_is_for_every_platform(
    compiler: str, clone: Path, tmp_path: Path
) -> None:
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    name = said(clone, sys.executable, "-c", build, str(tmp_path / "out"), CC=compiler).split()[-1]
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(tmp_path / "out" / name) as packed:
        assert not [one for one in packed.namelist() if "libpixels" in one]


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler, or no Linux on x86-64")
def test_an_editable_installation_has_the_library_in_the_clone(clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    program = (  # what pip and uv have hatchling run for -e
        "from hatch_build import BuildHook; hook = BuildHook('.', {}, None, None, '', 'wheel');"
        "hook.initialize('editable', {}); hook.finalize()"
    )
    said(clone, sys.executable, "-c", program)
    assert (clone / LIBRARY).exists()
    program = "from turbofit.core.installation import image_library; image_library()"
    said(clone, sys.executable, "-c", program)
    build = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"
    name = said(clone, sys.executable, "-c", build, str(tmp_path / "out")).split()[-1]
    with tarfile.open(tmp_path / "out" / name) as tar:
        assert not [one for one in tar.getnames() if "libpixels" in one]


def plans_and_reports(folder: Path, *run: str, **environ: str) -> None:
    environ["XDG_STATE_HOME"] = str(folder)
    words = ("plan", "internvl2-8b", "--on", "rtx3090+rtx4090", "--json")
    assert json.loads(said(folder, *run, *words, **environ))["fits"]
    said(folder, *run, "report", "latest", "--html", "report.html", **environ)
    assert "InternVL2-8B" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_wheel_plans_and_reports(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed)}
    run = (sys.executable, "-m", "turbofit")
    plans_and_reports(tmp_path, *run, **env)
    schema = said(tmp_path, *run, "report", "--schema", **env)
    assert json.loads(schema)["$id"] == "urn:turbofit:plan:2"
    program = "import turbofit; print(turbofit.__file__)"
    assert str(installed) in said(tmp_path, sys.executable, "-c", program, **env)


def test_every_preset_is_in_the_wheel_which_is_small(installed: Path, wheel: Path) -> None:
    assert wheel.stat().st_size <= 1_720_000
    inside, presets = installed / "turbofit" / "_presets", ROOT / "presets"
    texts = {
        path.relative_to(inside): path.read_text(encoding="utf-8") for path in inside.rglob("*.*")
    }
    assert texts == {
        path.relative_to(presets): path.read_text(encoding="utf-8") for path in presets.rglob("*.*")
    }
    assert (installed / "turbofit" / "py.typed").exists()
