"""What was checked of an adapter is what an engine opens, at its first start and at later ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import turbofit
from bench.rehearsal.adapters import write_adapter
from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.plan import Plan
from turbofit.model.adapter_folders import with_copies
from turbofit.model.source import resolve_model

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
#: A model whose engine opens an adapter's own file, and one whose engine opens a stacked copy.
LINKED, STACKED = "qwen2.5-0.5b", "internvl2-1b"
LAYERS = {LINKED: "model.layers", STACKED: "language_model.model.layers"}


def write(
    name: str, folder: Path, rank: int = 8, last: str = "down_proj", kind: str = "F32"
) -> Path:
    modules = ("q_proj", "k_proj", last)
    return write_adapter(
        resolve_model(name), folder, rank, modules, dtype=kind, layers=LAYERS[name]
    )


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    given: str = request.param
    return given


@pytest.fixture
def adapter(name: str, tmp_path: Path) -> Path:
    return write(name, tmp_path / "lora")


@pytest.fixture
def plan(name: str, adapter: Path) -> Plan:
    return turbofit.plan(
        name, on="1xl4", engine="pytorch", adapters=(f"sql={adapter}",), max_batch_size=8
    )


def opened(plan: Plan) -> Path:
    (word,) = plan.engines[0].settings.adapters or ()
    assert word.startswith("sql=")
    return Path(word.removeprefix("sql="))


@pytest.mark.parametrize("name", [LINKED])
def test_an_engine_gets_the_checked_file_alone(plan: Plan, adapter: Path, tmp_path: Path) -> None:
    assert opened(plan) == adapter
    folder = opened(with_copies(plan, tmp_path / "run"))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, FILE]
    assert (folder / FILE).readlink() == adapter / FILE
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == 16
    assert with_copies(plan, tmp_path / "run") == with_copies(plan, tmp_path / "run")


def of_rank_128(name: str, adapter: Path) -> None:
    shutil.rmtree(adapter)
    write(name, adapter, 128)


def of_other_modules(name: str, adapter: Path) -> None:
    shutil.rmtree(adapter)
    write(name, adapter, last="o_proj")


def of_16_bits(name: str, adapter: Path) -> None:
    shutil.rmtree(adapter)
    write(name, adapter, kind="F16")


def with_a_pickle(name: str, adapter: Path) -> None:
    (adapter / "adapter_model.bin").touch()


def larger(name: str, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 16}))


def grown(name: str, adapter: Path) -> None:
    with open(adapter / FILE, "ab") as file:
        file.write(b"more")


def without_a_file(name: str, adapter: Path) -> None:
    (adapter / FILE).unlink()


def removed(name: str, adapter: Path) -> None:
    shutil.rmtree(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_rank_128, r"the plan counts rank \d+, and now it has rank \d+"),
        (of_other_modules, "the plan counts modules .*down_proj, and now it has modules .*o_proj"),
        (of_16_bits, "the plan counts .* bytes, and now it has .* bytes"),
        (with_a_pickle, "adapter_model.bin cannot be checked"),
        (larger, "of another base"),
        (grown, "its header describes"),
        (without_a_file, "is missing in"),
        (removed, "neither a folder nor in the local hub cache"),
    ],
)
def test_an_adapter_that_changed_after_the_plan_is_not_loaded(
    plan: Plan, name: str, adapter: Path, tmp_path: Path,
    change: Callable[[str, Path], None], message: str,
) -> None:  # fmt: skip
    started = with_copies(plan, tmp_path / "run")
    change(name, adapter)
    for folder in ("run", "another run"):  # a restart, and a first start
        with pytest.raises(UsageError, match=message):
            with_copies(plan, tmp_path / folder)
    assert started.engines != plan.engines


def other_values(path: Path) -> None:
    """Other values of the same number, as after a further training."""
    with open(path / FILE, "rb+") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)


def other_scaling(path: Path) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 64}))


CHANGES = [
    lambda path: (path / FILE).unlink(), lambda path: (path / CONFIG).unlink(),
    lambda path: os.truncate(path / FILE, 100), lambda path: grown("", path), other_values,
    other_scaling, lambda path: (path / "adapter_model.bin").touch(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [STACKED])
def test_a_copy_that_changed_is_made_again(
    plan: Plan, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = opened(with_copies(plan, tmp_path / "run"))
    before = files(folder)
    change(folder)
    assert opened(with_copies(plan, tmp_path / "run")) == folder
    assert files(folder) == before


@pytest.mark.parametrize("change", [other_values, other_scaling])
def test_a_restart_loads_the_adapter_that_was_checked_for_it(
    plan: Plan, adapter: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before = files(opened(with_copies(plan, tmp_path / "run")))
    change(adapter)
    again = files(opened(with_copies(plan, tmp_path / "run")))
    assert again == files(opened(with_copies(plan, tmp_path / "another run"))) != before


@pytest.mark.parametrize("name", [STACKED])
def test_a_copy_that_an_engine_may_read_stays(plan: Plan, tmp_path: Path) -> None:
    folder = opened(with_copies(plan, tmp_path / "run"))
    before = [(folder / name).stat().st_ino for name in (CONFIG, FILE)]
    with_copies(plan, tmp_path / "run")
    assert [(folder / name).stat().st_ino for name in (CONFIG, FILE)] == before


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", [LINKED])
def test_a_folder_that_cannot_be_made(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="the folder of adapter sql cannot be made"):
        with_copies(plan, tmp_path / "file")
