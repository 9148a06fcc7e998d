"""Makes the folders of adapters that engines open: they have only the files that were checked.

Each adapter is read again first: it must be what the plan counts. The folder has a link to the
adapter's file. If the engine cannot read the file's names, or joins its modules, the folder has a
copy: with the names that the engine reads, or with stacked matrices.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from turbofit.core.errors import LaunchError
from turbofit.core.model import Adapter, Model
from turbofit.core.plan import Plan
from turbofit.model.adapters import (
    FILE,
    KEY,
    PARENTS,
    Stack,
    layers_of,
    layers_with,
    read_again,
    sizes_of,
    stack_of,
    used_modules,
)
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.merge import ADAPTER_CONFIG
from turbofit.model.safetensors import PREFIX, Tensor, header_length

#: The files that an engine opens.
_FILES = (ADAPTER_CONFIG, FILE)


def with_copies(plan: Plan, root: Path) -> Plan:
    """Return the plan with the folders of its adapters that engines open, below ``root``.

    Call this before each start of an engine. A folder from an earlier call stays unchanged, since
    an engine may be reading it; unless the adapter or the folder changed in between.

    Raises:
        UsageError: an adapter is not what the plan counts any more.
        LaunchError: a folder cannot be made.
    """
    only_text = any(engine.settings.language_model_only for engine in plan.engines)
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
    """Return ``folder`` with an adapter's config, and a link to its file or a copy."""
    adapter = read_again(model, planned, only_text=only_text)
    source = Path(adapter.path)
    if _is_current(folder, source):
        return folder
    try:
        given = json.loads((source / ADAPTER_CONFIG).read_bytes())
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if (stack := _stack(model, source)) is not None:
            _write_stacked(model, stack, source, folder / FILE)
            # An exact power of two, so that the engine's scaling is the adapter's to the last bit.
            alpha = given["lora_alpha"] * stack.rank / stack.file_rank
            given |= {"r": stack.rank, "lora_alpha": alpha, "target_modules": [*stack.modules]}
        elif adapter.renamed:
            _write_renamed(source / FILE, folder / FILE, str(layers_of(model)))
            given["target_modules"] = used_modules(model, adapter)
        else:
            (folder / FILE).symlink_to((source / FILE).resolve())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(given))
        for name in _FILES:
            if not (folder / name).is_symlink():
                os.utime(folder / name, ns=(0, (source / name).stat().st_mtime_ns))
    except OSError as exc:
        raise LaunchError(
            f"the folder of adapter {adapter.name} cannot be made: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a folder that can be written and has room",
        ) from None
    return folder


def _is_current(folder: Path, source: Path) -> bool:
    """Whether a folder has what was made of an adapter's files as they are now, and nothing else.

    A copy has its original's time of change; whatever changes one of the two changes its time.
    """
    try:
        times = [[(path / name).stat().st_mtime_ns for name in _FILES] for path in (folder, source)]
        return times[0] == times[1] and sorted(os.listdir(folder)) == sorted(_FILES)
    except OSError:
        return False


def _stack(model: Model, source: Path) -> Stack | None:
    """Return how the file of a checked adapter is stacked; None if it is not."""
    matrices = _matrices(source)
    rank = next(tensor.shape[0] for (_, _, part), tensor in matrices.items() if part == "A")
    return stack_of(model, [module for module, _, _ in matrices], rank)


def _matrices(source: Path) -> dict[tuple[str, int, str], Tensor]:
    """Return the matrices of an adapter's file, by module, layer and letter (A or B)."""
    header = FolderFiles(str(source)).header(FILE)
    found = ((KEY.fullmatch(key), tensor) for key, tensor in header.items())
    return {(m["module"], int(m["layer"]), m["part"]): tensor for m, tensor in found if m}


def _write_stacked(model: Model, stack: Stack, source: Path, target: Path) -> None:
    """Write an adapter's matrices as those of the modules that the engine joins.

    A of a joined module has the rows of its parts' A, one below the other. Its B has each part's B
    in rows and columns of its own. All else is zeros, which add nothing to the product.
    """
    matrices = _matrices(source)
    modules = [
        (layer, module, parts)
        for module, parts in stack.modules.items()
        for layer in layers_with(model, parts[0])
    ]
    dtype, item = next((one.dtype, one.bytes // one.elements) for one in matrices.values())
    header: dict[str, object] = {}
    end = 0
    for layer, module, parts in modules:
        place = f"{layers_of(model)}.{layer}.{PARENTS[parts[0]]}.{module}"
        for part, shape in zip("AB", stack.shapes(model, module), strict=True):
            begin, end = end, end + prod(shape) * item
            header[f"base_model.model.{place}.lora_{part}.weight"] = {
                "dtype": dtype, "shape": shape, "data_offsets": (begin, end),
            }  # fmt: skip
    row = stack.rank * item
    with open(source / FILE, "rb") as old, open(target, "wb") as new:
        _write_header(new, header)
        for layer, _, parts in modules:
            present = [part for part in parts if (part, layer, "A") in matrices]
            below = b"".join(_read(old, matrices[part, layer, "A"]) for part in present)
            new.write(below.ljust(row * sizes_of(model, parts[0])[1], b"\0"))
            for part in parts:
                if part not in present:
                    new.write(bytes(sizes_of(model, part)[0] * row))
                    continue
                block, width = _read(old, matrices[part, layer, "B"]), stack.file_rank * item
                left = bytes(present.index(part) * width)
                right = bytes(row - len(left) - width)
                rows = (block[begin : begin + width] for begin in range(0, len(block), width))
                new.writelines(left + one + right for one in rows)


def _read(file: BinaryIO, tensor: Tensor) -> bytes:
    file.seek(tensor.begin)
    return file.read(tensor.bytes)


def _write_header(file: BinaryIO, header: Mapping[str, object]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % PREFIX)
    file.write(len(text).to_bytes(PREFIX, "little") + text)


def _write_renamed(source: Path, target: Path, layers: str) -> None:
    """Copy a file of matrices with other names of the decoder's layers, and the same bytes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(header_length(old.read(PREFIX), None, FILE)))
        _write_header(new, {_renamed(key, layers): it for key, it in header.items()})
        shutil.copyfileobj(old, new)


def _renamed(key: str, layers: str) -> str:
    """Return a matrix's key with another name of the decoder's layers; other keys stay."""
    match = KEY.fullmatch(key)
    if match is None:
        return key
    return f"{key[: match.start('layers')]}{layers}{key[match.end('layers') :]}"
