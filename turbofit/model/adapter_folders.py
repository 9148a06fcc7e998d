"""Makes the folders of adapters that engines open.

An adapter with names that the engine does not read is copied, and the copy has the names that the
engine reads.
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
from turbofit.model.adapters import FILE, LAYERS
from turbofit.model.merge.merge import ADAPTER_CONFIG
from turbofit.model.safetensors import PREFIX, header_length

#: The name of the decoder's layers within such a key.
_NAME_OF_LAYERS: Final = re.compile(
    r"(?<=base_model\.model\.).+(?=\.\d{1,6}\.(?:self_attn|mlp)\.\w+\.lora_)"
)


def with_copies(plan: Plan, root: Path) -> Plan:
    """Return the plan with copies of adapters that are ``renamed``; engines open the copies.

    Copies stand below ``root``. A copy from an earlier call stays unchanged, since an engine may be
    reading it.

    Raises:
        LaunchError: a copy cannot be written.
    """
    loras = plan.model.loras
    if not any(adapter.renamed for adapter in loras):
        return plan
    words = tuple(
        f"{one.name}={_engine_folder(plan.model, one, root / str(number))}"
        for number, one in enumerate(loras)
    )
    engines = (
        replace(engine, settings=replace(engine.settings, adapters=words))
        for engine in plan.engines
    )
    return replace(plan, engines=tuple(engines))


def _engine_folder(model: Model, adapter: Adapter, folder: Path) -> str:
    """Return the folder that engines open: the adapter's own, or ``folder`` with a copy.

    The copy has other keys in its header, and other ``target_modules``; the bytes of its matrices
    are the adapter's.
    """
    config = folder / ADAPTER_CONFIG  # written last, so a copy with a config is complete
    if not adapter.renamed or config.exists():
        return str(folder) if adapter.renamed else adapter.path
    source, layers = Path(adapter.path), LAYERS[model.architecture]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(source / FILE, "rb") as old, open(folder / FILE, "wb") as new:
            header = json.loads(old.read(header_length(old.read(PREFIX), None, FILE)))
            renamed = {_NAME_OF_LAYERS.sub(layers, key): entry for key, entry in header.items()}
            text = json.dumps(renamed).encode()
            text += b" " * (-len(text) % PREFIX)
            new.write(len(text).to_bytes(PREFIX, "little") + text)
            shutil.copyfileobj(old, new)
        given = json.loads((source / ADAPTER_CONFIG).read_bytes())
        config.write_text(json.dumps({**given, "target_modules": adapter.modules}))
    except OSError as exc:
        raise LaunchError(
            f"the copy of adapter {adapter.name} cannot be written: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a folder that can be written and has room",
        ) from None
    return str(folder)
