"""Computes for real what programs steer by, although no kernel of a pretend GPU runs.

Each operation runs first as it is: the real allocator, the real errors. Then, where its tensors
are small or hold integers, it is done again on the CPU, on the same memory: pretend device memory
can be read and written by the host. So lengths, masks, indices and loops are right, and a network
of small tensors gives what it gives on a CPU. The rest is left alone; integers that nobody computed
are 0 (up to 4 million of them), so that an index made of them is valid.

It also tells the account which line of Python raised the peak. Runs inside the user's process; it
needs torch and nothing of turbofit.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from typing import Any

#: Elements of an operation's tensors, inputs and outputs together, up to which it is computed.
SMALL = 1 << 16
#: The same where all of them are integers or booleans.
INTEGERS = 1 << 22
_NOT_OURS = (os.path.dirname(os.path.abspath(__file__)),)


def install(torch: Any) -> None:
    """Watch this thread and all that begin later.

    Args:
        torch: the module, just imported.
    """
    if torch.version.cuda is None:
        return
    account = _Account()
    mode = _mode_class(torch)
    mode(account).__enter__()
    run = threading.Thread.run

    def watched(self: threading.Thread) -> None:
        with mode(account):
            run(self)

    threading.Thread.run = watched  # type: ignore[method-assign]


class _Account:
    """The account of this process: its peaks, and whose line raised them."""

    def __init__(self) -> None:
        folder = os.environ["TURBOFIT_PRETEND_LIBRARIES"]
        library = ctypes.CDLL(os.path.join(folder, "libturbofit_pretend.so"))
        self._peak = library.pretend_peak
        self._site = library.pretend_site
        self._peak.restype = ctypes.c_size_t
        self._devices = range(library.pretend_device_count())
        self._seen = [0] * len(self._devices)

    def look(self, operation: str) -> None:
        """Note the caller's line if a peak has risen since."""
        for device in self._devices:
            peak = self._peak(device)
            if peak > self._seen[device]:
                self._seen[device] = peak
                self.tell(operation)

    def tell(self, operation: str) -> None:
        """Note the caller's line, for a peak or a refusal that has no line yet."""
        self._site(f"{operation} {_caller()}".encode())


def _caller() -> str:
    """The innermost lines that are neither ours nor torch's."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_OURS) and f"{os.sep}torch{os.sep}" not in name:
            found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


def _mode_class(torch: Any) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_map

    aten = torch.ops.aten
    tensor = torch.Tensor
    shaped_by_values = {
        getattr(packet, name)
        for packet, names in (
            (aten.nonzero, ("default",)),
            (aten.masked_select, ("default",)),
            (aten._unique2, ("default",)),
            (aten.unique_dim, ("default",)),
            (aten.unique_consecutive, ("default",)),
            (aten.repeat_interleave, ("Tensor",)),
            (aten.bincount, ("default",)),
        )
        for name in names
    }
    by_index = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
    unset = {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
    hopeless: set[Any] = set()

    def on_card(value: Any) -> bool:
        return isinstance(value, tensor) and value.device.type == "cuda"

    def alias(value: Any) -> Any:
        """A CPU tensor on the same memory."""
        if not on_card(value):
            return value
        storage = value.untyped_storage()
        size, at = storage.nbytes(), storage.data_ptr()
        if not size or not at:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
        memory = (ctypes.c_char * size).from_address(at)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        whole = torch.empty(0, dtype=value.dtype).set_(
            flat.untyped_storage(), value.storage_offset(), value.size(), value.stride()
        )
        return whole.conj() if value.is_conj() else whole

    def here(value: Any) -> Any:
        """An argument for the CPU."""
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return alias(value)

    def uploaded(value: Any, device: Any) -> Any:
        if not isinstance(value, tensor):
            return value
        out = torch.empty_like(value, device=device)
        if out.numel():
            alias(out).copy_(value)
        return out

    def whole(dtype: Any) -> bool:
        return not (dtype.is_floating_point or dtype.is_complex)

    def is_view(func: Any) -> bool:
        returns = func._schema.returns
        return bool(returns) and all(
            one.alias_info is not None and not one.alias_info.is_write for one in returns
        )

    base: Any = TorchDispatchMode

    class Values(base):  # type: ignore[misc]
        """Runs each operation, and computes it where it matters."""

        def __init__(self, account: _Account) -> None:
            super().__init__()
            self._account = account

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            leaves = tree_flatten((args, kwargs))[0]
            inputs = [leaf for leaf in leaves if on_card(leaf)]
            if func in shaped_by_values and inputs:
                return self._shaped(func, args, kwargs, inputs[0].device)
            if func in by_index and inputs:
                args = (args[0], self._without_masks(args[1]), *args[2:])
            try:
                out = func(*args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                self._account.tell(str(func))
                raise
            outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, tensor)]
            if inputs or any(map(on_card, outputs)):
                self._account.look(str(func))
                if outputs and func not in unset and not is_view(func):
                    self._compute(func, args, kwargs, inputs, outputs)
            return out

        def _shaped(self, func: Any, args: Any, kwargs: Any, device: Any) -> Any:
            found = func(*tree_map(here, args), **tree_map(here, kwargs))
            out = tree_map(lambda value: uploaded(value, device), found)
            self._account.look(str(func))
            return out

        @staticmethod
        def _without_masks(indices: Any) -> list[Any]:
            """Masks become indices, which the real operation would have had to compute."""
            plain: list[Any] = []
            for index in indices:
                if on_card(index) and index.dtype in (torch.bool, torch.uint8):
                    found = alias(index).nonzero(as_tuple=True)
                    plain += [uploaded(one, index.device) for one in found]
                else:
                    plain.append(index)
            return plain

        @staticmethod
        def _compute(func: Any, args: Any, kwargs: Any, inputs: Any, outputs: Any) -> None:
            written = {id(one) for one in inputs}
            fresh = [one for one in outputs if id(one) not in written]
            every = (*inputs, *fresh)
            limit = INTEGERS if all(whole(one.dtype) for one in every) else SMALL
            if sum(one.numel() for one in every) <= limit and func not in hopeless:
                try:
                    found = func(*tree_map(here, args), **tree_map(here, kwargs))
                except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
                    hopeless.add(func)
                else:
                    results = [one for one in tree_flatten(found)[0] if isinstance(one, tensor)]
                    for result, place in zip(results, outputs, strict=False):
                        if id(place) not in written and place.numel():
                            alias(place).copy_(result)
                    return
            for one in fresh:
                most = INTEGERS if whole(one.dtype) else SMALL
                if on_card(one) and 0 < one.numel() <= most:
                    alias(one).zero_()

    return Values
