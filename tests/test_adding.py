"""Each recipe of docs/adding.md, followed in a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import make_internvl_hf
from turbofit.core.errors import UsageError
from turbofit.model.presets import preset_model
from turbofit.rehearsal.checkpoint.twin import twin_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SECTIONS = {
    part.splitlines()[0]: re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
    for part in (ROOT / "docs" / "adding.md").read_text().split("\n## ")[1:]
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("turbofit", "presets"):  # with what is compiled of it
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def follow(tree: Path, recipe: str, **environment: str) -> str:
    """What the recipe's last command says."""
    python = str(Path(sys.executable).parent)
    here = {"PYTHONPATH": str(tree), "PATH": f"{python}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-eu", "-c", recipe],
        cwd=tree, env={**os.environ, **here, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    return done.stdout


def test_every_section_has_its_recipe() -> None:
    assert {name: len(recipes) for name, recipes in SECTIONS.items()} == {
        "A GPU": 1, "A model by name": 1, "A checkpoint on pretend GPUs": 1, "A family": 1,
        "An image rule": 1, "An option of LMDeploy": 0, "An engine version": 2, "An engine": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("A GPU", ["fits: InternVL2-1B", "NVIDIA GeForce RTX 3060 8GB"]),
        ("A model by name", ["fits: My-InternVL on GPU 0"]),
        ("An image rule", ["fits: Strips-1B", "at most 5 tiles of 448x448"]),
        ("An engine", ["LMDeploy 0.18, toy", "fits: InternVL2-1B", "request *     1,024.0  estim"]),
    ],
)
def test_a_recipe(tree: Path, section: str, words: list[str]) -> None:
    told = follow(tree, SECTIONS[section][0])
    assert [word for word in words if word not in told] == []


def test_a_checkpoint_of_a_new_kind(tree: Path) -> None:
    """No Python is touched: what the rows write is read as the preset's own dims."""
    with pytest.raises(UsageError, match="Phi3ForCausalLM"):
        twin_of(preset_model("internvl2-4b"))
    told = follow(tree, SECTIONS["A checkpoint on pretend GPUs"][0])
    model, preset = json.loads(told.partition("\n")[2])["model"], preset_model("internvl2-4b")
    assert model["source"]["kind"] == "folder"
    assert (model["parameters"], model["weight_bytes"]) == (preset.parameters, preset.weight_bytes)
    assert (tree / "internvl2-4b" / "tokenizer.json").is_file()


def test_a_family(tree: Path, tmp_path: Path) -> None:
    folder = make_internvl_hf(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MyVLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    told = follow(tree, SECTIONS["A family"][0], MY_VL=str(folder))
    assert "MyVLForConditionalGeneration" in told
    assert "fits" in told
    made = json.loads(follow(tree, f"python -c '{FIGURES}' {folder}"))
    assert made["parameters"] == made["stand_in"]
    # TurboMind has a copy of a tied head; two ranks hold what is not split twice.
    assert made["pytorch"][0] == made["bytes"] <= made["turbomind"][0]
    assert all(whole / 2 < half < whole for whole, half in (made["pytorch"], made["turbomind"]))


#: A new family's count, bytes of a rank at tp 1 and 2, and its stand-in's elements.
FIGURES = """
import json, sys
from math import prod
from turbofit.memory.engines import engine_named
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import tensors, twin_of
model = resolve_model(sys.argv[1])
ranks = lambda name: [engine_named(name).weights(model, tp).total for tp in (1, 2)]
print(json.dumps({
    "parameters": model.parameters, "bytes": model.weight_bytes,
    "turbomind": ranks("turbomind"), "pytorch": ranks("pytorch"),
    "stand_in": sum(prod(shape) for _, _, shape in tensors(twin_of(model))),
}))
"""


def test_an_engine_version(tree: Path) -> None:
    told = follow(tree, SECTIONS["An engine version"][0])
    (line,) = (line for line in told.splitlines() if "gemm_workspace" in line)
    assert "67.0" in line  # 35 MiB and the 32 that the recipe added
    assert "newer than" not in told  # it has an account of its own


def test_a_changed_formula(tree: Path) -> None:
    """One file with one function: what rests on it moves, and nothing else does."""
    recipe = SECTIONS["An engine version"][1]
    older = follow(tree, recipe.splitlines()[-1].replace("0.19.0", "0.18.0"))
    newer = follow(tree, recipe)
    before, after = (
        dict(re.findall(r"([\w.]+) \*? +([\d,]+\.\d)  \w", said)) for said in (older, newer)
    )
    assert before.keys() == after.keys() > {"weights.mlp", "kv_cache", "text_prefill"}
    moved = {name for name, size in after.items() if size != before[name]}
    sums = {"steady", "peak", "headroom"}  # of a ledger's terms
    assert "vision_forward" in moved <= {"vision_request", "vision_forward", "pool_growth", *sums}
    assert "newer than" not in newer  # it has an account of its own
