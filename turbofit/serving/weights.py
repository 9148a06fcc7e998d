"""Downloads weights that are not on disk, before the engines start.

LMDeploy itself downloads weights once for each replica, without progress. The overlay, a folder of
links to a model's files, also needs the weights on disk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import LaunchError
from turbofit.core.model import Model
from turbofit.core.process.progress import Step, listening, tell, under_way
from turbofit.core.units import GIB, format_bytes
from turbofit.model.folder import hub_cache, modelscope_cache, uses_modelscope
from turbofit.planning.examine.scene import Sources
from turbofit.serving.process.child import child

_LOOK_SECONDS: Final = 1.0
_SAY_SECONDS: Final = 10.0
#: Seconds to wait for the end of a killed download.
_LAST_SECONDS: Final = 10.0
#: Bytes that stay free on the disk beside the weights.
_SPARE: Final = GIB

#: A program that downloads a model and prints the model's folder. Weights in other formats are
#: skipped, and so are torch's files if there are safetensors. Both hubs' packages take these
#: arguments.
_CODE: Final = """
import glob, sys
from {package} import snapshot_download
name, revision = sys.argv[1], sys.argv[2] or None
others = ["*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
folder = snapshot_download(name, revision=revision, ignore_patterns=["*.bin", *others])
if not glob.glob(glob.escape(folder) + "/*.safetensors"):
    folder = snapshot_download(name, revision=revision, ignore_patterns=others)
print(folder)
"""

#: Hints for a model that cannot be downloaded, by the hub's package.
HINTS: Final = {
    "huggingface_hub": "check HF_ENDPOINT, HF_TOKEN and the network, or give a folder",
    "modelscope": "LMDEPLOY_USE_MODELSCOPE is set: install modelscope, and check the model's id"
    " there and MODELSCOPE_API_TOKEN; or unset LMDEPLOY_USE_MODELSCOPE, or give a folder",
}

#: The folder of each checkpoint that this process has fetched, by id and revision.
_FOLDERS: Final[dict[tuple[str, str], str]] = {}


def fetched(model: Model, say: Callable[[str], None]) -> Model:
    """Return the model with its checkpoint on disk; download a missing checkpoint.

    The hub is Hugging Face's, or ModelScope if LMDEPLOY_USE_MODELSCOPE is set, as in LMDeploy. A
    signal ends the download; the hub's cache keeps the downloaded bytes.

    Raises:
        LaunchError: the disk is too small, the hub's package is missing, or the hub refuses.
    """
    where = model.source.checkpoint
    if (where is not None and os.path.isdir(where)) or model.hub_id is None:
        return model
    key = model.hub_id, model.revision or ""
    if key not in _FOLDERS:
        _FOLDERS[key] = _download(*key, model.weight_bytes, say)
    return replace(model, source=replace(model.source, checkpoint=_FOLDERS[key]))


def _cache() -> Path:
    return Path(modelscope_cache() if uses_modelscope() else hub_cache())


def _here(name: str) -> int:
    """Return the bytes of a model in its hub's cache, including other revisions and formats.

    Incomplete files that the hub stores in other folders are not included.
    """
    folder, hub = _cache(), f"models--{name.replace('/', '--')}"
    within = folder / "models" / name if uses_modelscope() else folder / hub / "blobs"
    size = 0
    for parent, _, files in os.walk(within):
        for file in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, file)).st_size
    return size


def _communicated(
    process: subprocess.Popen[bytes], name: str, size: int, say: Callable[[str], None]
) -> tuple[bytes, bytes]:
    """Wait for the end of a download's process, and return the process's output.

    Meanwhile the progress is shown, or printed every ten seconds if nothing displays progress.
    """
    said_at = time.monotonic()
    while True:
        step = Step(f"downloading {name}", _here(name), size, "bytes")
        tell(step)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_LOOK_SECONDS)
        if not listening() and time.monotonic() - said_at >= _SAY_SECONDS:
            said_at = time.monotonic()
            say(step.text)


def _download(name: str, revision: str, size: int, say: Callable[[str], None]) -> str:
    """Download a model's weights in a process; return the folder of the checkpoint.

    ``size`` is the number of bytes of all weights.

    Raises:
        LaunchError: the disk is too small, or the download failed.
    """
    disk, need = Sources().disk_free(str(_cache())), max(0, size - _here(name))
    if disk is not None and disk[0] < need + _SPARE:
        raise LaunchError(
            f"{_cache()} has {format_bytes(disk[0])} free, and the missing weights take "
            f"{format_bytes(need)}",
            hint="free disk space, or set "
            f"{'MODELSCOPE_CACHE' if uses_modelscope() else 'HF_HOME'} to a folder on another disk",
        )
    say(f"phase: download ({name}, {format_bytes(size)})")
    package = "modelscope" if uses_modelscope() else "huggingface_hub"
    command = [sys.executable, "-c", _CODE.format(package=package), name, revision]
    process = child(command, stderr=subprocess.PIPE)
    try:
        with under_way(f"downloading {name}"):
            out, errors = _communicated(process, name, size, say)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a hanging file system may hold the process
            process.wait(_LAST_SECONDS)
        raise
    folder = out.decode().strip().rpartition("\n")[2]
    if process.returncode != 0 or not os.path.isdir(folder):
        last = errors.decode(errors="replace").strip().rpartition("\n")[2][:300]
        last = last or f"exit code {process.returncode}"
        raise LaunchError(f"{name} cannot be downloaded: {last}", hint=HINTS[package])
    return folder
