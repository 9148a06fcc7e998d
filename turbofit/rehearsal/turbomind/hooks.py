"""Makes LMDeploy's own loader and engine run on the pretend machine of this process.

With a CUDA build of torch this module only marks phases. With CPU torch, a ``meta`` tensor without
data replaces each copy on the GPU. LMDeploy's own loader decides how long a copy lives. The account
keeps freed memory until ``torch.cuda.empty_cache``, as torch's caching allocator does. The account
knows no fragmentation between the segments of this allocator.
"""

from __future__ import annotations

import contextlib
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbofit.rehearsal.notes import called_after
from turbofit.rehearsal.pretend.libraries import LibraryAccount
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario

_ROUND: Final = 512  # bytes: torch's caching allocator makes each block a multiple of this size
_SEGMENT: Final = 2 << 20  # bytes: this allocator makes each segment a multiple of this size
_KEPT: Final[list[Any]] = []


class Staging(TorchDispatchMode):  # type: ignore[misc,unused-ignore]
    """Counts ``meta`` tensors as memory of a card, if they are made while this mode is active."""

    def __init__(self, account: LibraryAccount, device: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self._account, self._pool = account, account.pool(device, _SEGMENT)
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self._charge(leaf)
        return out

    def _charge(self, tensor: Any) -> None:
        """Count a tensor's memory until the tensor is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _ROUND) * _ROUND
        known = self._seen.get(key)
        if not size or (known is not None and known() is not None):
            return
        address = self._account.allocate(self._pool, size)
        if address is None:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB "
                "(turbofit pretend: staging of weights on the first GPU)"
            )

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self._account.free(address)

        self._seen[key] = weakref.ref(storage, gone)

    def empty_cache(self) -> None:
        """Give the unused memory back to the card, in place of ``torch.cuda.empty_cache``."""
        self._account.trim(self._pool)


def patch_torch(scenario: Scenario, staging: Staging) -> None:
    """Make ``torch.cuda`` describe the pretend machine; a copy on a card is a ``meta`` tensor."""
    declare_torchvision()
    gpus, current = scenario.gpus, 0
    cuda: Any = torch.cuda
    version: Any = torch.version
    tensor: Any = torch.Tensor

    @contextlib.contextmanager
    def device(chosen: Any) -> Iterator[None]:
        nonlocal current
        before, current = current, int(getattr(chosen, "index", chosen) or 0)
        try:
            yield
        finally:
            current = before

    def gpu(number: Any = 0) -> PretendGpu:
        return gpus[int(number or 0)]

    def properties(number: Any = 0) -> SimpleNamespace:
        card = gpu(number)
        major, minor = card.sm
        return SimpleNamespace(
            name=card.name, major=major, minor=minor, total_memory=card.total,
            multi_processor_count=card.sm_count,
        )  # fmt: skip

    cuda.device = device
    cuda.current_device = lambda: current
    cuda.device_count = lambda: len(gpus)
    cuda.is_available = lambda: True
    cuda.get_device_name = lambda number=0: gpu(number).name
    cuda.get_device_properties = properties
    cuda.get_device_capability = lambda number=0: gpu(number).sm
    cuda.mem_get_info = lambda number=0: (gpu(number).total - gpu(number).used, gpu(number).total)
    version.cuda = version.cuda or "12.8"  # without a CUDA version LMDeploy uses no bfloat16
    cuda.is_bf16_supported = lambda *_: gpus[0].sm >= (8, 0)
    cuda.empty_cache = staging.empty_cache
    cuda.synchronize = lambda *_: None
    tensor.cuda = lambda self, *_, **__: torch.empty_like(self, device="meta")


def declare_torchvision() -> None:
    """Declare operators that torchvision's CUDA build needs and CPU torch lacks."""
    if torch.version.cuda is not None or _KEPT:
        return
    spec = importlib.util.find_spec("torchvision")
    libraries = list(Path(spec.origin).parent.glob("_C*.so")) if spec and spec.origin else []
    if not libraries:
        return
    operators: Any = torch.ops
    try:
        operators.load_library(str(libraries[0]))
    except OSError:
        make: Any = torch.library.Library
        library = make("torchvision", "DEF")
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(f"nms{boxes}")
        library.define(f"qnms{boxes}")
        _KEPT.append(library)


def install(
    scenario: Scenario,
    account: LibraryAccount,
    *,
    first_device: int = 0,
    tokenizer: bool = False,
    ready: Callable[[Any], None] = lambda _engine: None,
) -> None:
    """Make an engine's start mark its phases, and install the stand-ins that CPU torch needs.

    ``first_device`` is the card on which the loader stages tensors. ``tokenizer`` keeps the model's
    own tokenizer, which a server needs. ``ready`` is called with the TurboMind object after its
    start.
    """
    staging: Any = None
    if torch.version.cuda is None:
        staging = Staging(account, first_device)
        patch_torch(scenario, staging)
    from lmdeploy.turbomind import turbomind
    from lmdeploy.turbomind.model_loader import ModelLoader
    from lmdeploy.turbomind.turbomind import _tm

    from turbofit.rehearsal.turbomind.hfconfig import plain_gpt_oss_tokenizer, register_internvl

    register_internvl()
    plain_gpt_oss_tokenizer()
    module: Any = turbomind
    if not tokenizer:
        module.Tokenizer = _NoTokenizer
    engine: Any = module.TurboMind
    loader: Any = ModelLoader
    for method, phase in (
        ("_create_weight", "context"),
        ("_process_weights", "prepare"),
        ("_create_engine", "engine"),
    ):
        mark = partial(account.mark, phase)
        setattr(engine, method, called_after(mark, getattr(engine, method)))
    export, start, copy_from = loader.export, engine.__init__, _tm.Tensor.copy_from

    def exported(self: Any) -> Any:
        account.mark("weights")
        with staging or contextlib.nullcontext():
            return export(self)

    def copy(self: Any, source: Any, *stream: Any) -> None:
        if not getattr(source, "is_meta", False):
            copy_from(self, source, *stream)

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        account.mark("ready")
        ready(self)

    loader.export, engine.__init__, _tm.Tensor.copy_from = exported, started, copy


class _NoTokenizer:
    """Replaces the model's tokenizer: a rehearsal sends ids of tokens, and needs none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.model = None
        self.bos_token_id = self.eos_token_id = None
