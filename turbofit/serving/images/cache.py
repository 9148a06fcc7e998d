"""Keeps prepared images by a hash of their bytes and options, up to a number of bytes.

Clients send a chat's pictures again with each turn. The cache keeps copies and returns copies, so
that no request can change the image of another request.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from inspect import ismethod
from io import BytesIO
from typing import Any, Final

#: The attribute of an image with the hash of its encoded bytes.
_SOURCE: Final = "turbofit_source"
#: Formats in which Pillow knows a picture's size before decoding.
_LATE: Final = ("JPEG", "MPO", "PNG", "WEBP")
_PROCESSORS: Final = "lmdeploy.serve.processors.multimodal"


def name_images() -> None:
    """Have LMDeploy keep with each image a hash of the image's encoded bytes."""
    module: Any = __import__(_PROCESSORS, fromlist=["ImageMediaIO"])
    if not hasattr(module.ImageMediaIO, "named"):
        module.ImageMediaIO = _with_hashes(module.ImageMediaIO)


def _with_hashes(base: Any) -> Any:
    """Return a subclass of ``base``, LMDeploy's image reader, that keeps hashes of images."""

    class NamedImageIO(base):  # type: ignore[misc]
        """LMDeploy's image reader, with a hash of an image's bytes and late decoding."""

        named = True

        def load_bytes(self, data: bytes) -> Any:
            """Open an image without decoding it, if its format and mode allow."""
            from PIL import Image

            image: Any = Image.open(BytesIO(data))
            if image.mode != self.image_mode or image.format not in _LATE:
                image = image.convert(self.image_mode)
            setattr(image, _SOURCE, (hashlib.sha256(data).hexdigest(), self.image_mode))
            return image

    return NamedImageIO


def digest(images: Any, *options: Any) -> bytes | None:
    """Return a hash of images, also in nested lists, and of options.

    None if an image has no hash of its bytes.
    """
    try:
        described = repr((_sources(images), options))
    except AttributeError:
        return None
    return hashlib.sha256(described.encode()).digest()


def _sources(images: Any) -> Any:
    """Return the hashes of images' bytes, in the nesting of the given lists."""
    if isinstance(images, list | tuple):
        return [_sources(image) for image in images]
    return getattr(images, _SOURCE)


def with_fingerprints(model: Any) -> Callable[..., Any]:
    """Wrap a model's ``preprocess`` so that each prepared image gets a ``fingerprint``."""
    preprocess = model.preprocess

    @wraps(preprocess)
    def named(messages: Any, *arguments: Any) -> Any:
        """Prepare images as LMDeploy does, then name each by its source, options and shape."""
        given = [item for item in model.collect_multimodal_items(messages) if item[0] == "image"]
        options = arguments[1:]  # the first argument is the prompt
        answer = preprocess(messages, *arguments)
        # The answer's form depends on the model's class.
        items = answer[-1]["content"] if isinstance(answer, list) else answer["multimodal"]
        prepared = [item for item in items if "pixel_values" in item]
        if len(given) != len(prepared):
            return answer
        for (_, image, chosen), item in zip(given, prepared, strict=True):
            values, grid = item["pixel_values"], str(item.get("image_grid_thw"))
            shape = values.shape, values.dtype, grid
            name = digest(image, sorted(chosen.items()), options, *shape)
            if name is not None:
                item["fingerprint"] = name
        return answer

    return named


class ImageCache:
    """A cache of at most ``most`` bytes, which drops the least recently used value first.

    ``held`` is the number of bytes in the cache.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._kept: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Any:
        """Return a copy of a key's value; None if the cache has no value for the key."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            value = self._kept[key]
        return deepcopy(value)  # outside the lock, for which other threads wait

    def put(self, key: bytes, value: Any) -> None:
        """Keep a copy of a value, unless the value is larger than the cache."""
        size = byte_size(value)
        if size > self.most:
            return
        copied = deepcopy(value)  # outside the lock, as in `get`
        with self._lock:
            self.held -= byte_size(self._kept.pop(key, ()))
            while self.held + size > self.most:
                _, dropped = self._kept.popitem(last=False)
                self.held -= byte_size(dropped)
            self._kept[key] = copied
            self.held += size


def byte_size(value: Any) -> int:
    """Return the bytes of all tensors and arrays in a processor's result."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if hasattr(value, "values"):
        return sum(map(byte_size, value.values()))
    return sum(map(byte_size, value)) if isinstance(value, list | tuple) else 0


def keep_prepared(model: Any, cache: ImageCache) -> None:
    """Have a model of LMDeploy cache its processor's results for clients' images.

    LMDeploy's models prepare images by ``image_transform``, by a method, or by a processor object.
    """
    if hasattr(model, "image_transform"):
        model.image_transform = cached(model.image_transform, cache)
    elif ismethod(model.processor):
        model.processor = cached(model.processor, cache)
    else:
        processor = getattr(model.processor, "image_processor", model.processor)
        processor.preprocess = cached(processor.preprocess, cache)


def cached(prepare: Callable[..., Any], cache: ImageCache) -> Callable[..., Any]:
    """Return ``prepare`` with a cache of its results, by images and options."""

    def prepare_once(images: Any, *arguments: Any, **options: Any) -> Any:
        """Return the cached result for these images and options, or prepare the images."""
        key = digest(images, arguments, sorted(options.items()))
        if key is None:
            return prepare(images, *arguments, **options)
        found = cache.get(key)
        if found is None:
            found = prepare(images, *arguments, **options)
            cache.put(key, found)
        return found

    return prepare_once
