"""Whatever a checkpoint's files hold: the model is refused, or survives JSON."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.hostile import hostile
from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.struct import decode, to_json
from turbofit.model.checkpoint import Origin, read_checkpoint
from turbofit.model.folder import FolderFiles, is_complete

#: By the first byte of a piece.
NAMES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "video_preprocessor_config.json", "model.safetensors.index.json", "model.safetensors",
    "model-1.safetensors",
)  # fmt: skip


@hostile("checkpoints")
def test_a_checkpoint_is_refused_or_is_a_model(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        for piece in data.split(b"|~|"):
            if piece:
                (Path(folder) / NAMES[piece[0] % len(NAMES)]).write_bytes(piece[1:])
        is_complete(folder)
        try:
            model = read_checkpoint(FolderFiles(folder), Origin("m", "folder", folder))
        except UsageError:
            return
    assert decode(to_json(model), Model, what="the model") == model
    assert model.parameters > 0
