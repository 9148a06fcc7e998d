"""Keeps prepared images by a hash of their bytes and options, within a given memory.

Clients send a chat's pictures again with each turn. The first request gets the tensors that are
kept, later ones get copies. Kept tensors that were changed are dropped, so that no request can
change what another gets.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from copy import deepcopy
from inspect import ismethod
from typing import TYPE_CHECKING, Any, NamedTuple

from turbofit.serving.images.sources import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class ImageCache:
    """Values by key, of at most ``most`` bytes in all; the least recently used are dropped."""

    def __init__(self, most: int) -> None:
        self.most, self.held, self.hits = most, 0, 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Any:
        """A copy of the kept value; None if there is none, or it was changed."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return None
            self._kept.move_to_end(key)
        copied = deepcopy(kept.value)  # without the lock, for which others would wait
        with self._lock:
            if kept.versions == _versions(kept.value):
                self.hits += 1
                return copied
            self._drop(key)
        return None

    def put(self, key: bytes, value: Any) -> None:
        """Keep a value that is not too large; its tensors are not copied, which takes as long."""
        size = byte_size(value)
        if size > self.most:
            return
        shared = {id(tensor): tensor for tensor in _tensors(value)}
        kept = _Kept(deepcopy(value, shared), size, _versions(value))
        with self._lock:
            self._drop(key)
            self._kept[key] = kept
            self.held += size
            while self.held > self.most:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        if key in self._kept:
            self.held -= self._kept.pop(key).size


class _Kept(NamedTuple):
    """A value, its bytes, and how often each of its tensors had been changed when it was kept."""

    value: Any
    size: int
    versions: list[int]


def _versions(value: Any) -> list[int]:
    """How often each tensor was changed, also through views, by torch's count."""
    return [tensor._version for tensor in _tensors(value)]


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "_version"):
        yield value
    elif hasattr(value, "values"):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def byte_size(value: Any) -> int:
    """Bytes of all tensors and arrays in a processor's result."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if hasattr(value, "values"):
        return sum(map(byte_size, value.values()))
    return sum(map(byte_size, value)) if isinstance(value, list | tuple) else 0


def keep_prepared(model: Any, cache: ImageCache) -> None:
    """Have a model of LMDeploy cache its processor's results for images that clients send."""
    if hasattr(model, "image_transform"):
        model.image_transform = kept(model.image_transform, cache)
    elif ismethod(model.processor):
        model.processor = kept(model.processor, cache)
    else:
        processor = getattr(model.processor, "image_processor", model.processor)
        processor.preprocess = kept(processor.preprocess, cache)


def kept(prepare: Callable[..., Any], cache: ImageCache) -> Callable[..., Any]:
    """The same function, with cached results for equal images and options."""

    def once(images: Any, *arguments: Any, **options: Any) -> Any:
        key = digest(images, arguments, sorted(options.items()))
        if key is None:
            return prepare(images, *arguments, **options)
        found = cache.get(key)
        if found is None:
            found = prepare(images, *arguments, **options)
            cache.put(key, found)
        return found

    return once
