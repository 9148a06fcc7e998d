"""Which engine runs a model, whose account answers for a version, which releases list a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.presets import presets_dir
from turbofit.memory.engines import engine_for, engine_named
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("model", "engine", "new"),
    [
        ("qwen3.5-4b", "turbomind", "gated delta nets"),
        ("glm-4.7-flash", "turbomind", "multi-head latent attention"),
        ("deepseek-v2-lite", "pytorch", "multi-head latent attention"),
        ("gpt-oss-20b", "turbomind", "attention sinks"),
        ("qwen3-omni-30b-a3b", "pytorch", "an audio tower"),
    ],
)
def test_what_older_versions_hold_otherwise_is_refused_there(model, engine, new):
    dims = resolve_model(model)
    assert engine_for(dims, engine, "0.18.0").name == engine
    with pytest.raises(UsageError, match=rf"no account of {new} with LMDeploy 0\.12\.0"):
        engine_for(dims, engine, "0.12.0")


def test_what_transformers_alone_runs_is_said_where_another_engine_was_named():
    with pytest.raises(UsageError) as told:
        engine_for(resolve_model("llava-v1.6-mistral-7b"), "pytorch")
    assert told.value.hint == "--engine transformers runs the model"


#: Predictions, as JSON without the time at which they were made, by version and engine.
PREDICT = """
import json, sys
from pathlib import Path
from turbofit.core import presets
if len(sys.argv) > 1:
    presets.presets_dir = lambda: Path(sys.argv[1])
    from turbofit.core import version
    version.REFERENCE = "0.19"
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


def test_a_newer_version_is_the_nearest_older_one_with_twice_the_margin() -> None:
    known = turbofit.predict("internvl2-8b", on="1xrtx3090")
    newer = turbofit.predict("internvl2-8b", on="1xrtx3090", lmdeploy="0.19.0")
    assert engine_named("turbomind", "0.19.0").version == newer.backend.version == "0.18"
    assert newer.ledgers[0].margin == 2 * known.ledgers[0].margin
    assert newer.ledgers[0].peak == known.ledgers[0].peak
    assert "LMDeploy 0.19.0 is newer than 0.18" in newer.warnings[0]
    # Who says what to leave free knows better.
    asked = turbofit.predict("internvl2-8b", on="1xrtx3090", lmdeploy="0.19.0", margin="1GiB")
    assert asked.ledgers[0].margin == 1 << 30


@pytest.mark.slow
def test_another_reference_changes_no_older_version_s_answer(tmp_path: Path) -> None:
    folder = tmp_path / "presets"
    shutil.copytree(presets_dir(), folder)
    for engine in OLDER:
        text = (folder / "engines" / f"{engine}-0.18.yaml").read_text()
        text = text.replace("0.18", "0.19").replace("value: 1", "value: 2")
        (folder / "engines" / f"{engine}-0.19.yaml").write_text(text)

    def made(*words: str) -> dict[str, object]:
        ran = subprocess.run(
            [sys.executable, "-c", PREDICT, *words],
            input=json.dumps({engine: [*versions, ""] for engine, versions in OLDER.items()}),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(json.loads(ran.stdout))

    before, after = made(), made(str(folder))
    now = {f"{engine} " for engine in OLDER}
    assert {name: one for name, one in after.items() if name not in now} == {
        name: one for name, one in before.items() if name not in now
    }
    assert all("0.19" in str(after[name]) and after[name] != before[name] for name in now)
