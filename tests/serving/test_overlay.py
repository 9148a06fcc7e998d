from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.core.images.rules import BUDGET, CANVAS, PAGES
from tests.gateway.limits.test_sharing import FRAMES
from tests.gateway.lmdeploy_front import make, plan_of
from tests.support.checkpoints import make_internvl2, make_internvl_hf, make_text
from tests.support.checkpoints_llava import make_llava
from tests.support.gateway import limits_for
from tests.support.plans import plausible_plan
from turbofit.core.errors import LaunchError, UsageError
from turbofit.model.source import resolve_model
from turbofit.serving.overlay import edits, make_overlay


def test_links_edited_files_and_the_same_name(tmp_path) -> None:
    folder = make_internvl2(tmp_path / "OpenGVLab" / "InternVL2-1B")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    over = make_overlay(plan_of(folder, 5), tmp_path / "o")
    assert over.name == "InternVL2-1B"
    assert {path.name for path in over.iterdir()} == set(before)
    assert [p.name for p in over.iterdir() if not p.is_symlink()] == ["config.json"]
    config = json.loads(before["config.json"])
    assert read(over / "config.json") == {**config, "max_dynamic_patch": 5}
    assert resolve_model(str(over)).image_rule.max_dynamic_patch == 5
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # A later start makes what somebody has removed, and leaves the rest as it is.
    (over / "config.json").write_text("{}")
    (over / "model.safetensors").unlink()
    assert make_overlay(plan_of(folder, 5), tmp_path / "o") == over
    assert read(over / "config.json") == {}
    assert (over / "model.safetensors").resolve() == folder / "model.safetensors"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_original_serves_where_its_own_limit_is_the_plans_or_it_has_no_images(tmp_path) -> None:
    folder, text = make_internvl2(tmp_path / "m"), make_text(tmp_path / "t")
    plan = plan_of(folder, 12)
    limits = msgspec.structs.replace(plan.promise.limits, vision_unit=None)
    textual = plausible_plan(model=resolve_model(str(text)), limits=limits)
    for plan_, served in ((plan, folder), (textual, text)):
        assert make_overlay(plan_, tmp_path / "o") == served
    assert not (tmp_path / "o").exists()


def test_both_pixel_bounds_in_every_spelling(tmp_path) -> None:
    folder = make("qwen2-vl", tmp_path)
    plan = plan_of(folder, 2000)
    (changed,) = edits(folder, plan.model.image_rule, plan.promise.limits).values()
    bounds = {"min_pixels": 2000, "max_pixels": 2000}
    size = {"shortest_edge": 2000, "longest_edge": 2000}
    assert {**bounds, "size": size}.items() <= changed.items()
    assert changed["image_processor_type"] == "Qwen2VLImageProcessor"


def test_a_processor_that_is_nested_in_another_file_is_found(tmp_path) -> None:
    """Transformers 5 reads no other file where processor_config.json holds an image processor."""
    folder = make_internvl_hf(tmp_path / "InternVL3-hf")
    nested, path = read(folder / "preprocessor_config.json"), folder / "processor_config.json"
    path.write_text(json.dumps({**read(path), "image_processor": nested}))
    over = make_overlay(plan_of(folder, 3), tmp_path / "o")
    written = read(over / "processor_config.json")
    assert (written["image_processor"]["max_patches"], written["image_seq_length"]) == (3, 256)
    assert read(over / "preprocessor_config.json")["max_patches"] == 3


def test_names_of_a_hub_cache_keep_the_model_in_the_path(tmp_path) -> None:
    cache = tmp_path / "models--OpenGVLab--InternVL2-1B"
    blobs = make_internvl2(cache / "blobs")
    folder = cache / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    over = make_overlay(plan_of(folder, 4), tmp_path / "o")
    assert over.parts[-3:] == ("models--OpenGVLab--InternVL2-1B", "snapshots", "abc123")
    assert (over / "model.safetensors").resolve() == (blobs / "model.safetensors").resolve()


def test_what_cannot_be_done_is_said(tmp_path) -> None:
    good, bad, without = (make_internvl2(tmp_path / name) for name in ("good", "bad", "without"))
    plans = plausible_plan(), plan_of(good, 4), plan_of(bad, 4), plan_of(without, 4)
    (bad / "config.json").write_text("[")
    (without / "config.json").unlink()
    (tmp_path / "file").touch()
    errors = (UsageError, LaunchError, UsageError, UsageError)
    words = ("not on this machine", "overlay", r"config\.json", r"config\.json")
    for plan, error, word in zip(plans, errors, words, strict=True):
        with pytest.raises(error, match=word):
            make_overlay(plan, tmp_path / "file")


def test_fewer_grids_are_written_for_model_and_processor(tmp_path) -> None:
    folder = make_llava(tmp_path / "llava-v1.6-7b-hf", "llava_next")
    plan = plan_of(folder, 2)
    over = make_overlay(plan, tmp_path / "o")
    grids = [[336, 672], [672, 336]]
    for name in ("config.json", "preprocessor_config.json"):
        assert read(over / name)["image_grid_pinpoints"] == grids
    assert resolve_model(str(over)).image_rule.worst_units() == 3
    (folder / "preprocessor_config.json").write_text("{}")
    changed = edits(folder, plan.model.image_rule, limits_for(plan.model.image_rule, limit=1))
    assert changed["config.json"]["image_grid_pinpoints"] == [[336, 336]]
    assert changed["config.json"]["vision_config"]["image_size"] == 336


KEPT = {"auto_map": {"AutoProcessor": "a.B"}, "media_proc_cfg": {"patch_size": 14}}


@pytest.mark.parametrize(
    ("rule", "limit", "before", "after"),
    [
        (PAGES, 4, {"num_crops": 16}, {"num_crops": 4}),
        (CANVAS, 4, {"max_patches": 16}, {"max_patches": 4}),
        (CANVAS, 16, {"max_patches": 16}, None),
        (FRAMES, 78400, {}, {
            "min_pixels": 12544, "max_pixels": 156800,
            "size": {"shortest_edge": 12544, "longest_edge": 156800},
        }),
        (BUDGET, 4096 * 14**2, KEPT, {
            **KEPT, "media_proc_cfg": {"patch_size": 14, "in_patch_limit": 4096},
        }),
    ],
)  # fmt: skip
def test_the_processor_s_file_has_the_limit_in_its_own_words(
    tmp_path, rule, limit, before, after
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(before))
    changed = edits(tmp_path, rule, limits_for(rule, limit=limit))
    assert changed == ({} if after is None else {"preprocessor_config.json": after})
