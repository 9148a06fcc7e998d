"""A plan from the built wheel: presets travel inside it, and nothing of the checkout is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.sweep import sweep

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    return next(folder.glob("turbofit-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built of the sdist, as an index's users without a wheel would, in pip's own environment."""
    folder = sdist.parent
    words = ["wheel", "--no-deps", "--wheel-dir", str(folder), str(sdist)]
    subprocess.run([*PIP, *words], check=True, capture_output=True)
    return next(folder.glob("turbofit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "site"
    words = ["install", "--no-deps", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([*PIP, *words], check=True, capture_output=True)
    return target


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git here: an sdist")
def test_the_sdist_has_all_that_git_has(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {name for name in listed if (ROOT / name).exists()} <= packed


def said(folder: Path, *words: str, **environ: str) -> str:
    """What a command prints that is run in a folder."""
    return subprocess.run(
        words, cwd=folder, env=os.environ | environ, check=True, capture_output=True, text=True
    ).stdout


def test_the_wheel_plans_and_reports(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed), "XDG_STATE_HOME": str(tmp_path)}
    run = (sys.executable, "-m", "turbofit")
    plan = said(tmp_path, *run, "plan", "internvl2-8b", "--on", "4xrtx3090", "--json", **env)
    assert json.loads(plan)["fits"]
    said(tmp_path, *run, "report", "latest", "--html", "report.html", **env)
    assert "InternVL2-8B" in (tmp_path / "report.html").read_text()
    schema = said(tmp_path, *run, "report", "--schema", **env)
    assert json.loads(schema)["$id"] == "urn:turbofit:plan:1"
    program = "import turbofit; print(turbofit.__file__)"
    assert str(installed) in said(tmp_path, sys.executable, "-c", program, **env)


def test_every_preset_is_in_the_wheel_which_is_small(installed: Path, wheel: Path) -> None:
    """Rooms of many are one file each."""
    with zipfile.ZipFile(wheel) as packed:
        assert len(packed.namelist()) <= 720
    assert wheel.stat().st_size <= 1_550_000
    inside, texts = installed / "turbofit" / "_presets", {}
    for path in inside.rglob("*.*"):
        if path.parent == inside and path.suffix == ".json" and "profile" not in path.name:
            texts |= {
                Path(path.stem, f"{name}.yaml"): text
                for name, text in json.loads(path.read_text(encoding="utf-8")).items()
            }
        else:
            texts[path.relative_to(inside)] = path.read_text(encoding="utf-8")
    presets = ROOT / "presets"
    assert texts == {
        path.relative_to(presets): path.read_text(encoding="utf-8") for path in presets.rglob("*.*")
    }
    assert (installed / "turbofit" / "py.typed").exists()


def test_the_wheel_knows_all_that_the_checkout_knows(installed: Path, tmp_path: Path) -> None:
    program = (
        "import json; from turbofit.machine.presets import preset_names;"
        "from turbofit.model.presets import known_presets, find_preset;"
        "from turbofit.rehearse.checkpoint.kinds import kinds;"
        "print(json.dumps([sorted(preset_names()), sorted(known_presets()), sorted(kinds()),"
        "find_preset('qwen2-vl-7b'), find_preset('nothing')]))"
    )
    there, here = (
        said(tmp_path, sys.executable, "-c", program, PYTHONPATH=str(path))
        for path in (installed, ROOT)
    )
    assert there == here


@pytest.mark.exhaustive
def test_a_type_checker_takes_the_wheels_types(installed: Path, tmp_path: Path) -> None:
    """Only with `py.typed` does it; all would be `Any` else (PEP 561)."""
    (tmp_path / "use.py").write_text(
        "import turbofit\n"
        'plan = turbofit.plan("internvl2-8b", on="4xrtx3090")\n'
        "reveal_type(plan.gpus[0].headroom)\n"
        "turbofit.plan(3)\n"
        'turbofit.PlanRequest(model="m", tp=2)\n'
        'turbofit.PlanRequest(model="m", tp="two")\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "use.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = done.stdout.splitlines()
    assert found[0] == 'use.py:3: note: Revealed type is "int"', done.stdout
    assert 'use.py:4: error: Argument 1 to "plan" has incompatible type' in found[1]
    assert 'use.py:6: error: Argument "tp" to "PlanRequest" has incompatible type' in found[2]


def _interpreters() -> list[str]:
    """Every Python from 3.10 on that is at hand beside this one, one a minor version."""
    found = []
    for minor in range(10, 15):
        if minor == sys.version_info.minor:
            continue
        places = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        on_path = shutil.which(f"python3.{minor}")
        for place in [*map(str, places), *([on_path] if on_path else [])]:
            if subprocess.run([place, "--version"], capture_output=True, check=False).returncode:
                continue  # a shim of a version that is not installed
            found.append(place)
            break
    return found


@pytest.mark.parametrize("python", sweep(_interpreters(), 9))
def test_other_interpreters_install_it_and_run(python: str, wheel: Path, tmp_path: Path) -> None:
    """With its dependencies, in an environment of its own."""
    own = tmp_path / "venv" / "bin"
    words = ["-m", "venv", "--without-pip", str(own.parent)]
    subprocess.run([python, *words], check=True, capture_output=True)
    words = ["--python", str(own / "python"), "install", str(wheel)]
    subprocess.run([*PIP, *words], check=True, capture_output=True)
    assert not list(own.parent.glob("lib/python*/site-packages/torch*"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env["XDG_STATE_HOME"] = str(tmp_path)

    def told(*words: str) -> str:
        command = [str(own / "turbofit"), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    plan = told("plan", "internvl2-8b", "--on", "rtx3090+rtx4090", "--json")
    assert json.loads(plan)["fits"]
    told("report", "latest", "--html", "report.html")
    assert "InternVL2-8B" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "_TURBOFIT_COMPLETE=bash_complete" in told("completion", "bash")
