"""What was checked of an adapter is what an engine opens, at its first start and at later ones."""

from __future__ import annotations

import json
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

QWEN = resolve_model("qwen2.5-0.5b")
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(QWEN, tmp_path / "lora", 8, ("q_proj", "down_proj"))


@pytest.fixture
def plan(adapter: Path) -> Plan:
    return turbofit.plan("qwen2.5-0.5b", on="1xl4", adapters=(f"sql={adapter}",), max_batch_size=8)


def opened(plan: Plan) -> Path:
    (word,) = plan.engines[0].settings.adapters or ()
    assert word.startswith("sql=")
    return Path(word.removeprefix("sql="))


def test_an_engine_gets_the_checked_file_alone(plan: Plan, adapter: Path, tmp_path: Path) -> None:
    assert opened(plan) == adapter
    folder = opened(with_copies(plan, tmp_path / "run"))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, FILE]
    assert (folder / FILE).readlink() == adapter / FILE
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == 16
    assert with_copies(plan, tmp_path / "run") == with_copies(plan, tmp_path / "run")


def of_rank_128(adapter: Path) -> None:
    shutil.rmtree(adapter)
    write_adapter(QWEN, adapter, 128, ("q_proj", "down_proj"))


def of_other_modules(adapter: Path) -> None:
    shutil.rmtree(adapter)
    write_adapter(QWEN, adapter, 8, ("q_proj", "up_proj"))


def of_16_bits(adapter: Path) -> None:
    shutil.rmtree(adapter)
    write_adapter(QWEN, adapter, 8, ("q_proj", "down_proj"), dtype="F16")


def with_a_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.bin").touch()


def larger(adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 16}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_rank_128, "the plan counts rank 8, and now it has rank 128"),
        (of_other_modules, "the plan counts modules q_proj, down_proj, and now it has modules q_p"),
        (of_16_bits, "the plan counts 5,799,936 bytes, and now it has 2,899,968 bytes"),
        (with_a_pickle, "adapter_model.bin cannot be checked"),
        (larger, "of another base"),
        (shutil.rmtree, "neither a folder nor in the local hub cache"),
    ],
)
def test_an_adapter_that_changed_after_the_plan_is_not_loaded(
    plan: Plan, adapter: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    started = with_copies(plan, tmp_path / "run")
    change(adapter)
    for folder in ("run", "another run"):  # a restart, and a first start
        with pytest.raises(UsageError, match=message):
            with_copies(plan, tmp_path / folder)
    assert started.engines != plan.engines


def test_a_folder_that_cannot_be_made(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="the folder of adapter sql cannot be made"):
        with_copies(plan, tmp_path / "file")
