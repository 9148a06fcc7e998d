"""What CPU-only torch lacks for LMDeploy's loader, in a rehearsal's child only."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from turbofit.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearse.turbomind.headers import HeaderCheckpoint


def declare_torchvision() -> None:
    """Declares two operators without which torchvision cannot be imported.

    Only where torchvision's own library does not load: its CUDA build beside CPU-only torch.
    """
    spec = importlib.util.find_spec("torchvision")
    found = list(Path(spec.origin).parent.glob("_C*.so")) if spec and spec.origin else []
    if not found:
        return
    operators: Any = torch.ops
    try:
        operators.load_library(str(found[0]))
    except OSError:
        make: Any = torch.library.Library
        library = make("torchvision", "DEF")
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(f"nms{boxes}")
        library.define(f"qnms{boxes}")
        _KEPT.append(library)


_KEPT: list[Any] = []


class FirstDevice:
    """The current device of torch's side: staging always happens on ``devices[0]``."""

    index = 0


@contextlib.contextmanager
def _device(device: Any) -> Iterator[None]:
    before, FirstDevice.index = FirstDevice.index, int(getattr(device, "index", device) or 0)
    try:
        yield
    finally:
        FirstDevice.index = before


def patch_torch(scenario: Scenario, empty_cache: Callable[[], None]) -> None:
    """Gives ``torch.cuda`` answers about the pretend machine."""
    gpus = scenario.gpus
    cuda: Any = torch.cuda
    cuda.device = _device
    cuda.current_device = lambda: FirstDevice.index
    cuda.device_count = lambda: len(gpus)
    cuda.is_available = lambda: True
    cuda.get_device_name = lambda device=0: gpus[int(device or 0)].name
    cuda.get_device_properties = lambda device=0: _properties(gpus[int(device or 0)])
    cuda.get_device_capability = lambda device=0: gpus[int(device or 0)].sm
    cuda.mem_get_info = lambda device=0: (
        gpus[int(device or 0)].total - gpus[int(device or 0)].used,
        gpus[int(device or 0)].total,
    )
    version: Any = torch.version
    version.cuda = version.cuda or "12.8"  # LMDeploy asks it before it uses bfloat16
    cuda.is_bf16_supported = lambda *_: gpus[0].sm >= (8, 0)
    cuda.empty_cache = empty_cache
    cuda.synchronize = lambda *_: None
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self


def _properties(gpu: PretendGpu) -> SimpleNamespace:
    return SimpleNamespace(
        name=gpu.name,
        major=gpu.sm[0],
        minor=gpu.sm[1],
        total_memory=gpu.total,
        multi_processor_count=gpu.sm_count,
    )


class NoTokenizer:
    """In place of the model's tokenizer: a rehearsal gives token ids."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.model = None
        self.bos_token_id = self.eos_token_id = None


def patch_lmdeploy(*, tokenizer: bool, headers: bool) -> None:
    """A tokenizer only if wanted; weights from headers, with no copies of what has no data."""
    from lmdeploy.turbomind import _tm, model_loader, turbomind

    engine: Any = turbomind
    if not tokenizer:
        engine.Tokenizer = NoTokenizer
    if not headers:
        return

    def checkpoint(path: str, *, mappings: Any = ()) -> HeaderCheckpoint:
        return HeaderCheckpoint(Path(path), mappings)

    loader: Any = model_loader
    loader.create_checkpoint = checkpoint
    copy_from = _tm.Tensor.copy_from

    def copy(self: Any, source: Any) -> None:
        if getattr(getattr(source, "device", None), "type", None) != "meta":
            copy_from(self, source)

    _tm.Tensor.copy_from = copy
