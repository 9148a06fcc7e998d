"""Computes the values that control a program, although pretend GPUs run no kernel.

Each operation of torch first runs unchanged, with the real allocator and the real errors. If its
tensors are small (up to 65,536 elements, or 4 million integers), the operation runs again on the
CPU. The memory of a pretend card is memory of the host, so the CPU writes the result into the same
tensors. So lengths, masks, indices and loops are correct; large float tensors stay uncomputed.
If the CPU cannot repeat an operation, its small new tensors become 0: a valid index. A shape that
depends on uncomputed values is refused with a sentence: it is not known. The pretend machine's
account learns which line of Python was refused memory. This module needs torch and
nothing of turbofit.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: The CPU repeats an operation if its inputs and outputs have this many elements at most.
SMALL = 1 << 16
#: The limit if all elements are integers or booleans.
INTEGERS = 1 << 22

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = f"{os.sep}torch{os.sep}"
_FRAMES = 5

_aten: Any = torch.ops.aten
#: Operations whose outputs have a shape that depends on values. Only the CPU runs them.
_SHAPED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}
#: Operations that take indices: `_without_masks` prepares the indices.
_BY_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
#: Operations whose outputs have no values, so there is nothing to compute.
_UNSET = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
#: Copies: from the host, they fill even large tensors.
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
#: The addresses of the memory of large tensors that no operation has filled.
_uncomputed: set[int] = set()
#: Operations that failed on the CPU once; they are not tried again.
_hopeless: set[Any] = set()


def install() -> None:
    """Watch torch's operations in this thread and in all threads that start later."""
    if torch.version.cuda is None:
        return
    _Values().__enter__()  # type: ignore[no-untyped-call,unused-ignore]
    run = threading.Thread.run

    def watched(self: threading.Thread) -> None:
        with _Values():
            run(self)

    threading.Thread.run = watched  # type: ignore[method-assign]
    _map_files()
    _watch_printing()


def _watch_printing() -> None:
    """Watch operations while a tensor is printed, too: torch turns all modes off for this."""
    real = torch._tensor_str._str_intern

    def str_intern(*args: Any, **kwargs: Any) -> Any:
        with _Values():
            return real(*args, **kwargs)

    torch._tensor_str._str_intern = str_intern


def _map_files() -> None:
    """Let safetensors map files; under a dispatch mode, torch would copy the files."""
    real = torch.asarray

    def asarray(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, torch.UntypedStorage):
            return real(value, *args, **kwargs)
        with torch._C._DisableTorchDispatch():
            return real(value, *args, **kwargs)

    torch.asarray = asarray  # type: ignore[assignment,unused-ignore]


def _note_refusal(operation: str) -> None:
    """Tell the pretend machine's account which line of Python was refused memory just now."""
    folder = os.environ["TURBOFIT_PRETEND_LIBRARIES"]
    library = ctypes.CDLL(os.path.join(folder, "libturbofit_pretend.so"))
    library.pretend_site(f"{operation} {_caller()}".encode())


class _Values(TorchDispatchMode):  # type: ignore[misc,unused-ignore]
    """Runs each operation of torch, and computes its result if a program may depend on it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default makes torch import Dynamo, which skips code under a mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and give values to its outputs if they are small."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _on_card(leaf)]
        if func in _SHAPED_BY_VALUES and inputs:
            _refuse_uncomputed(func, inputs[-1 if func is _aten.masked_select.default else 0])
            result = _on_host(func, args, kwargs)
            return tree_map(lambda value: _uploaded(value, inputs[0].device), result)
        if func in _BY_INDEX and inputs:
            args = (args[0], _without_masks(args[1]), *args[2:])
        try:
            out = func(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            _note_refusal(str(func))
            raise
        outputs = _tensors(out)
        touches_card = inputs or any(map(_on_card, outputs))
        if touches_card and outputs and func not in _UNSET and not _is_view(func):
            _remember(outputs, filled=_compute(func, args, kwargs, inputs, outputs))
        return out


def _remember(outputs: Sequence[Any], *, filled: bool) -> None:
    """Note whether the memory of these outputs has values; small outputs always have values."""
    for tensor in filter(_on_card, outputs):
        if filled or _is_small((tensor,)):
            _uncomputed.discard(_memory(tensor))
        else:
            _uncomputed.add(_memory(tensor))


def _refuse_uncomputed(func: Any, value: Any) -> None:
    """Refuse an operation whose output has a shape that depends on uncomputed values.

    Raises:
        RuntimeError: no operation has filled the memory of ``value``.
    """
    if _memory(value) in _uncomputed:
        raise RuntimeError(
            f"pretend GPUs compute no values of large tensors, so the shape that {func} returns for"
            f" {value.numel():,} elements is not known"
        )


def _compute(func: Any, args: Any, kwargs: Any, inputs: Any, outputs: Any) -> bool:
    """Repeat an operation on the host, and copy the result into its new outputs.

    Return whether large outputs have values. An output that shares memory with an input needs no
    copy: the host has changed that memory.
    """
    memories = {_memory(tensor) for tensor in inputs}
    fresh = [tensor for tensor in outputs if _memory(tensor) not in memories]
    if _is_small((*inputs, *fresh)) and func not in _hopeless:
        try:
            computed = _on_host(func, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            _hopeless.add(func)
        else:
            new = {id(tensor) for tensor in fresh}
            for result, place in zip(_tensors(computed), outputs, strict=False):
                if id(place) in new and place.numel():
                    _alias(place).copy_(result)
            return True
    _clear_small(fresh)
    return func in _COPIES and not all(map(_on_card, _tensors(args)))


def _clear_small(tensors: Sequence[Any]) -> None:
    """Make small tensors of a card 0."""
    for tensor in tensors:
        if _on_card(tensor) and tensor.numel() and _is_small((tensor,)):
            _alias(tensor).zero_()


def _on_host(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the host, with its inputs in the card's memory; return the result."""
    return func(*tree_map(_here, args), **tree_map(_here, kwargs))


def _is_small(tensors: Sequence[Any]) -> bool:
    """Return whether the host computes an operation with these tensors (`SMALL`, `INTEGERS`)."""
    limit = INTEGERS if all(_is_whole(tensor.dtype) for tensor in tensors) else SMALL
    return bool(sum(tensor.numel() for tensor in tensors) <= limit)


def _tensors(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(value: Any) -> int:
    return int(value.untyped_storage().data_ptr())


def _on_card(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def _alias(value: Any) -> Any:
    """Return a CPU tensor that shares a card tensor's memory; return other values unchanged."""
    if not _on_card(value):
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


def _here(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else _alias(value)


def _uploaded(value: Any, device: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    out = torch.empty_like(value, device=device)
    if out.numel():
        _alias(out).copy_(value)
    return out


def _without_masks(indices: Any) -> list[Any]:
    """Replace masks among ``indices`` by the positions that they select, computed on the host."""
    plain: list[Any] = []
    for index in indices:
        if _on_card(index) and index.dtype in (torch.bool, torch.uint8):
            _refuse_uncomputed(_aten.nonzero.default, index)
            positions = _alias(index).nonzero(as_tuple=True)
            plain += [_uploaded(tensor, index.device) for tensor in positions]
        else:
            plain.append(index)
    return plain


def _caller() -> str:
    """Return the innermost five lines of Python outside torch and outside this folder."""
    lines: list[str] = []
    frame: Any = sys._getframe(1)
    while frame is not None and len(lines) < _FRAMES:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) and _TORCH not in name:
            name = name.rpartition("site-packages/")[2]
            lines.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)
