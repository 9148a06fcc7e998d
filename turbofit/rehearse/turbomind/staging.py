"""Charges to the first pretend card what loading stages there through torch.

LMDeploy copies each checkpoint tensor to the first GPU and splits, casts, pads and joins it there
before it hands the shards to TurboMind. With CPU torch those tensors are ``meta`` tensors; their
lifetimes are real, since LMDeploy's loader runs, so each storage is charged while it lives. Memory
that torch's caching allocator would keep is kept until ``torch.cuda.empty_cache``. This is a model
of that allocator (a pool that keeps its high-water mark), not the allocator itself: fragmentation
between its segments is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbofit.pretend.library import LibraryAccount

_ROUND = 512  # bytes; torch's caching allocator rounds each block up to this


def _mode(charge: Callable[[Any], None]) -> Any:
    """A dispatch mode that shows each ``meta`` tensor an operation returns to ``charge``."""
    base: Any = _TorchDispatchMode

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del self, types
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                charge(leaf)
        return out

    return type("PretendStagingMode", (base,), {"__torch_dispatch__": dispatch})()


class Staging:
    """Charges the storages of ``meta`` tensors that are made under ``mode`` to a card.

    Attributes:
        mode: a context manager; while it is active, new tensors are charged.
        live, peak: bytes of tensors now, and at most.
    """

    def __init__(self, account: LibraryAccount, device: int) -> None:
        self.mode = _mode(self._charge)
        self._account = account
        self._pool = account.pool(device)
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.live = 0
        self.peak = 0

    def _charge(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._seen.get(key)
        if known is not None and known() is not None:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        if not size:
            return
        address = self._account.allocate(self._pool, size)
        if address is None:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB "
                "(turbofit pretend: staging of weights on the first GPU)"
            )
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.live -= size
            self._account.free(address)

        self._seen[key] = weakref.ref(storage, gone)

    def empty_cache(self) -> None:
        """What ``torch.cuda.empty_cache`` does: gives back what no tensor uses."""
        self._account.trim(self._pool)
