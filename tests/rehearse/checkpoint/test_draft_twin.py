"""Stand-ins of drafts: LMDeploy's names, and what turbofit reads back of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from turbofit.core.draft import Draft
from turbofit.model.draft_reader import read_draft
from turbofit.model.folder import FolderFiles
from turbofit.model.source import resolve_model
from turbofit.pretend.scenario import Scenario
from turbofit.rehearse.checkpoint.twin import checkpoint_for, speculative_of
from turbofit.rehearse.engines import ADAPTERS
from turbofit.rehearse.spec import Spec

MODEL = resolve_model("llama-3.1-8b")


def draft_of(method: Any, embeddings: bool) -> Draft:
    return Draft(
        method=method, num_speculative_tokens=2, model="EAGLE/some", embeddings=embeddings,
        text=replace(MODEL.text, layers=1), vocab=32000 if method == "eagle3" else MODEL.text.vocab,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "embeddings"), [("eagle", True), ("eagle3", False), ("eagle3", True)]
)
def test_a_stand_in_is_read_as_the_draft(tmp_path: Path, method: Any, embeddings: bool) -> None:
    draft = draft_of(method, embeddings)
    told = speculative_of(draft, MODEL, tmp_path)
    assert (told["method"], told["num_speculative_tokens"]) == (method, 2)
    again = read_draft(MODEL, method, told["model"], 2)
    assert again == replace(draft, model=told["model"], text=again.text)
    assert replace(again.text, max_position_embeddings=1) == replace(
        draft.text, max_position_embeddings=1
    )
    tensors = FolderFiles(told["model"]).weights().tensors
    assert tensors is not None
    assert ("midlayer.self_attn.q_proj.weight" in tensors) is (method == "eagle3")
    # What has a folder of its own is taken from there.
    assert speculative_of(again, MODEL, tmp_path / "x")["model"] == told["model"]


def test_layers_of_the_target_are_in_its_own_stand_in(tmp_path: Path) -> None:
    model = resolve_model("glm-4.5-air")
    moe = model.text.moe
    assert moe is not None
    model = replace(model, text=replace(model.text, layers=2, moe=replace(moe, layers=1)))
    draft = read_draft(model, "deepseek_mtp", None, 1)
    folder = checkpoint_for(model, tmp_path / "with", draft=draft)
    tensors = FolderFiles(str(folder)).weights().tensors
    assert tensors is not None
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.head.weight"} <= set(
        tensors
    )
    assert read_draft(model, "deepseek_mtp", str(folder), 1).text == draft.text
    assert speculative_of(draft, model, tmp_path) == {
        "method": "deepseek_mtp", "num_speculative_tokens": 1, "model": "",
    }  # fmt: skip
    plain = FolderFiles(str(checkpoint_for(model, tmp_path / "without"))).weights().tensors
    assert plain is not None
    assert not any(name.startswith("model.layers.2.") for name in plain)


def test_only_drafting_finds_the_stand_in_for_flash_attention(tmp_path: Path) -> None:
    assert speculative_of(None, MODEL, tmp_path) == {}
    specs = [
        Spec(Scenario(()), str(tmp_path), speculative=told) for told in ({}, {"method": "eagle"})
    ]
    first = [ADAPTERS["pytorch"].path_of(spec)[-1] for spec in specs]
    held = [(folder / "flash_attn_interface.py").is_file() for folder in first]
    assert held == [False, True]
