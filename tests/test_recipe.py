"""The conda recipe has pyproject.toml's version, requirements, scripts and description."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import turbofit

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
RECIPE = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def requirements(section: str) -> set[str]:
    return {one.replace(" ", "") for one in RECIPE["requirements"][section]}


def test_it_is_this_version() -> None:
    assert RECIPE["context"]["version"] == turbofit.__version__
    assert RECIPE["about"]["summary"] == PROJECT["description"]
    assert RECIPE["about"]["license"] == PROJECT["license"]
    assert (ROOT / RECIPE["about"]["license_file"]).exists()


def test_it_needs_what_the_wheel_needs() -> None:
    python = f"python{PROJECT['requires-python']}"
    assert requirements("run") == {python, *PROJECT["dependencies"]}
    assert requirements("host") == {python, "pip", *PYPROJECT["build-system"]["requires"]}


def test_it_has_the_wheels_scripts() -> None:
    scripts = {f"{name} = {target}" for name, target in PROJECT["scripts"].items()}
    assert set(RECIPE["build"]["python"]["entry_points"]) == scripts


def test_all_is_every_extra_that_adds_a_feature() -> None:
    extras = PROJECT["optional-dependencies"]
    (all_of_them,) = extras["all"]
    named = set(all_of_them.removeprefix("turbofit[").removesuffix("]").split(","))
    assert named == set(extras) - {"all", "gateway"}  # which comes with each
