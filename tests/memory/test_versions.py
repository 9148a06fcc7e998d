"""Whose account answers for a version of LMDeploy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import turbofit
from turbofit.core.presets import presets_dir
from turbofit.memory.engines import engine_named
from turbofit.memory.versions import account_version, doubt, is_legacy, parse

#: Predictions, as JSON without the time at which they were made, by version and engine.
PREDICT = """
import json, sys
from pathlib import Path
from turbofit.core import presets
if len(sys.argv) > 1:
    presets.presets_dir = lambda: Path(sys.argv[1])
    from turbofit.memory import versions
    versions.REFERENCE = "0.19"
import turbofit
made = {}
for engine, versions in json.load(sys.stdin).items():
    for version in versions:
        plan = turbofit.predict("internvl2-8b", on="2xrtx3090", tp=2, engine=engine,
                                lmdeploy=version or None)
        made[f"{engine} {version}"] = json.loads(plan.to_json()) | {"created": ""}
json.dump(made, sys.stdout)
"""
OLDER = {"turbomind": ["0.5.3", "0.12.0", "0.15.0", "0.16.0", "0.17.0", "0.18.0"],
         "pytorch": ["0.6.0", "0.10.0", "0.18.0"]}  # fmt: skip


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.6", (0, 6, 0)), ("v0.5.2.post1", (0, 5, 2)), ("0.19.0rc1", (0, 19, 0)), ("new", None)],
)
def test_a_version_s_numbers(version: str, numbers: tuple[int, int, int] | None) -> None:
    assert parse(version) == numbers


def test_each_version_has_an_account_or_the_nearest_older_one_s() -> None:
    assert is_legacy("0.17.9")
    assert not is_legacy("0.18.0")
    assert [account_version("turbomind", v) for v in ("0.18.3", "0.19", "1.2", "new", "0.17")] == [
        "0.18", "0.18", "0.18", None, None,
    ]  # fmt: skip
    assert doubt("turbomind", None) is doubt("pytorch", "0.18.1") is None
    assert "0.19 is newer than 0.18" in str(doubt("pytorch", "0.19"))


def test_a_newer_version_is_the_nearest_older_one_with_twice_the_margin() -> None:
    known = turbofit.predict("internvl2-8b", on="1xrtx3090")
    newer = turbofit.predict("internvl2-8b", on="1xrtx3090", lmdeploy="0.19.0")
    assert engine_named("turbomind", "0.19.0").version == newer.engine.version == "0.18"
    assert newer.gpus[0].margin == 2 * known.gpus[0].margin
    assert newer.gpus[0].peak == known.gpus[0].peak
    assert "LMDeploy 0.19.0 is newer than 0.18" in newer.warnings[0]
    # Who says what to leave free knows better.
    asked = turbofit.predict("internvl2-8b", on="1xrtx3090", lmdeploy="0.19.0", margin="1GiB")
    assert asked.gpus[0].margin == 1 << 30


def test_another_reference_changes_no_older_version_s_answer(tmp_path: Path) -> None:
    folder = tmp_path / "presets"
    shutil.copytree(presets_dir(), folder)
    for engine in OLDER:
        text = (folder / "engines" / f"{engine}-0.18.yaml").read_text()
        text = text.replace("0.18", "0.19").replace("value: 1", "value: 2")
        (folder / "engines" / f"{engine}-0.19.yaml").write_text(text)

    def made(versions: dict[str, list[str]], *words: str) -> dict[str, object]:
        ran = subprocess.run(
            [sys.executable, "-c", PREDICT, *words],
            input=json.dumps(versions), capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(json.loads(ran.stdout))

    before, after = made(OLDER), made(OLDER, str(folder))
    assert after == before
    now = {engine: [""] for engine in OLDER}
    moved = made(now, str(folder))
    assert moved != made(now)
    assert all("0.19" in str(one) for one in moved.values())
