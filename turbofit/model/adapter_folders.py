"""Makes the folders of adapters that engines open, with the files that were checked alone.

Each adapter is read again first: it must be what the plan counts. The folder has a link to the
adapter's file. If the engine cannot read the adapter's names, the folder has a copy with the names
that the engine reads.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import LaunchError
from turbofit.core.model import Adapter, Model
from turbofit.core.plan import Plan
from turbofit.model.adapters import FILE, LAYERS, read_again
from turbofit.model.merge.merge import ADAPTER_CONFIG
from turbofit.model.safetensors import PREFIX, header_length

#: The name of the decoder's layers within such a key.
_NAME_OF_LAYERS: Final = re.compile(
    r"(?<=base_model\.model\.).+(?=\.\d{1,6}\.(?:self_attn|mlp)\.\w+\.lora_)"
)


def with_copies(plan: Plan, root: Path) -> Plan:
    """Return the plan with the folders of its adapters that engines open, below ``root``.

    Call this before each start of an engine. A folder from an earlier call stays unchanged, since
    an engine may be reading it.

    Raises:
        UsageError: an adapter is not what the plan counts any more.
        LaunchError: a folder cannot be made.
    """
    only_text = plan.engines[0].settings.language_model_only
    words = tuple(
        f"{one.name}={_engine_folder(plan.model, one, root / str(number), only_text=only_text)}"
        for number, one in enumerate(plan.model.loras)
    )
    if not words:
        return plan
    engines = (
        replace(engine, settings=replace(engine.settings, adapters=words))
        for engine in plan.engines
    )
    return replace(plan, engines=tuple(engines))


def _engine_folder(model: Model, planned: Adapter, folder: Path, *, only_text: bool) -> Path:
    """Return ``folder`` with an adapter's config, and a link to its file or a renamed copy."""
    adapter = read_again(model, planned, only_text=only_text)
    config = folder / ADAPTER_CONFIG  # written last, so a folder with a config is complete
    if config.exists():
        return folder
    source = Path(adapter.path)
    try:
        given = json.loads((source / ADAPTER_CONFIG).read_bytes())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).unlink(missing_ok=True)
        if adapter.renamed:
            _write_renamed(source / FILE, folder / FILE, LAYERS[model.architecture])
            given["target_modules"] = adapter.modules
        else:
            (folder / FILE).symlink_to((source / FILE).resolve())
        config.write_text(json.dumps(given))
    except OSError as exc:
        raise LaunchError(
            f"the folder of adapter {adapter.name} cannot be made: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a folder that can be written and has room",
        ) from None
    return folder


def _write_renamed(source: Path, target: Path, layers: str) -> None:
    """Copy a file of matrices with other names of the decoder's layers, and the same bytes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(header_length(old.read(PREFIX), None, FILE)))
        renamed = {_NAME_OF_LAYERS.sub(layers, key): entry for key, entry in header.items()}
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % PREFIX)
        new.write(len(text).to_bytes(PREFIX, "little") + text)
        shutil.copyfileobj(old, new)
