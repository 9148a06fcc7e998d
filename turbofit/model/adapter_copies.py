"""Writes copies of LoRA adapters with the names that LMDeploy's PyTorch engine reads.

The header's keys and ``target_modules`` change; the bytes of the tensors do not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from msgspec.structs import replace

from turbofit.core.errors import LaunchError
from turbofit.core.model import Adapter, Model
from turbofit.core.plan import Plan
from turbofit.model.adapters import ADAPTER_FILE, lmdeploy_key
from turbofit.model.merge.merge import ADAPTER_CONFIG
from turbofit.model.safetensors import PREFIX, header_length


def with_copies(plan: Plan, root: Path) -> Plan:
    """Return the plan whose engines open copies, below ``root``, of adapters that are ``renamed``.

    Copies from an earlier call stay unchanged, since engines may be reading them.

    Raises:
        LaunchError: a copy cannot be written.
    """
    loras = plan.model.loras
    if not any(adapter.renamed for adapter in loras):
        return plan
    folders = [_opened(plan.model, one, root / str(number)) for number, one in enumerate(loras)]
    words = tuple(f"{one.name}={folder}" for one, folder in zip(loras, folders, strict=True))
    engines = [
        replace(engine, settings=replace(engine.settings, adapters=words))
        for engine in plan.engines
    ]
    return replace(plan, engines=tuple(engines))


def _opened(model: Model, adapter: Adapter, folder: Path) -> str:
    """Return the folder that engines open: the adapter's own, or ``folder`` with a copy."""
    if not adapter.renamed:
        return adapter.path
    source, config = Path(adapter.path), folder / ADAPTER_CONFIG
    if config.exists():  # it is written last
        return str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(source / ADAPTER_FILE, "rb") as old, open(folder / ADAPTER_FILE, "wb") as new:
            length = header_length(old.read(PREFIX), None, ADAPTER_FILE)
            header = json.loads(old.read(length))
            renamed = {lmdeploy_key(model, key): entry for key, entry in header.items()}
            text = json.dumps(renamed).encode()
            text += b" " * (-len(text) % PREFIX)
            new.write(len(text).to_bytes(PREFIX, "little") + text)
            shutil.copyfileobj(old, new)
        values = json.loads((source / ADAPTER_CONFIG).read_bytes())
        config.write_text(json.dumps(values | {"target_modules": adapter.modules}))
    except OSError as exc:
        raise LaunchError(
            f"the copy of adapter {adapter.name} cannot be written: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a folder that can be written and has room",
        ) from None
    return str(folder)
