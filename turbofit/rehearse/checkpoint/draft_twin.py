"""Header-only checkpoints of drafts for speculative decoding."""

from __future__ import annotations

import json
from pathlib import Path

from msgspec.structs import replace

from turbofit.core.draft import Draft
from turbofit.core.json_types import Options
from turbofit.core.model import Model
from turbofit.rehearse.checkpoint.header_only import write_header
from turbofit.rehearse.checkpoint.kinds import config_from, kinds, rows_of, values_of

__all__ = ["speculative_of"]


def speculative_of(draft: Draft | None, model: Model, scratch: Path) -> Options:
    """The fields of LMDeploy's SpeculativeConfig; empty where nothing drafts.

    A draft that is a checkpoint of its own is taken from its folder, or a stand-in is written.

    Args:
        draft: what drafts.
        model: its target.
        scratch: where a stand-in is written.
    """
    if draft is None:
        return {}
    folder = Path(draft.model).expanduser()
    if draft.has_checkpoint and not any(folder.glob("*.safetensors")):
        folder = _write(draft, model, scratch / "draft")
    return {
        "method": draft.method,
        "num_speculative_tokens": draft.num_speculative_tokens,
        "model": str(folder) if draft.has_checkpoint else "",
    }


def _write(draft: Draft, model: Model, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kind = kinds()[draft.method]
    values = {
        **values_of(replace(model, text=draft.text, vision=None, dtype="bfloat16"), "", 0, {}),
        "target_hidden": model.text.hidden,
        "draft_vocab": draft.vocab,
        "embeddings": draft.embeddings,
    }
    (folder / "config.json").write_text(json.dumps(config_from(kind.config, values)), "utf-8")
    write_header(folder / "model.safetensors", rows_of(kind.rows, kind.parts, values, ""))
    return folder
