"""Images that know the bytes they were made from, so that their pixels need no hash.

LMDeploy's TurboMind recognises an image by a SHA-256 of all its prepared pixels, 11 to 48 MB for
one of 1920x1080, computed in its event loop, where all requests wait. It uses another name if there
is one (``fingerprint``): here a hash of the client's bytes and of the options.
"""

from __future__ import annotations

import hashlib
from functools import wraps
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: The attribute of an image that identifies the bytes it was made from.
_SOURCE: Final = "turbofit_source"
#: Formats whose pictures know their size before they are decoded.
_LATE: Final = ("JPEG", "MPO", "PNG", "WEBP")
_PROCESSORS: Final = "lmdeploy.serve.processors.multimodal"


def name_images() -> None:
    """Let LMDeploy's images keep a name of the bytes they were made from."""
    module: Any = __import__(_PROCESSORS, fromlist=["ImageMediaIO"])
    if not hasattr(module.ImageMediaIO, "named"):
        module.ImageMediaIO = _named(module.ImageMediaIO)


def _named(base: Any) -> Any:
    class NamedImageIO(base):  # type: ignore[misc]
        """LMDeploy's class; its images keep their source's name, and are decoded when needed."""

        named = True

        def load_bytes(self, data: bytes) -> Any:
            from PIL import Image

            image: Any = Image.open(BytesIO(data))
            if image.mode != self.image_mode or image.format not in _LATE:
                image = image.convert(self.image_mode)
            setattr(image, _SOURCE, (hashlib.sha256(data).hexdigest(), self.image_mode))
            return image

    return NamedImageIO


def digest(images: Any, *options: Any) -> bytes | None:
    """A name for images, in nested lists too, with these options; None if one has no source."""
    try:
        described = repr((_sources(images), options))
    except AttributeError:
        return None
    return hashlib.sha256(described.encode()).digest()


def _sources(images: Any) -> Any:
    if isinstance(images, list | tuple):
        return [_sources(image) for image in images]
    return getattr(images, _SOURCE)


def with_fingerprints(model: Any) -> Callable[..., Any]:
    """A model's ``preprocess``, whose prepared images have a fingerprint."""
    preprocess = model.preprocess

    @wraps(preprocess)
    def named(messages: Any, *arguments: Any) -> Any:
        given = [item for item in model.collect_multimodal_items(messages) if item[0] == "image"]
        options = arguments[1:]  # the first is the prompt, which is no part of an image
        answer = preprocess(messages, *arguments)
        _name(given, _prepared(answer), options)
        return answer

    return named


def _prepared(answer: Any) -> list[Any]:
    """The prepared images of an answer in either form that LMDeploy's models give."""
    items = answer[-1]["content"] if isinstance(answer, list) else answer["multimodal"]
    return [item for item in items if "pixel_values" in item]


def _name(given: Sequence[Any], prepared: Sequence[Any], options: Any) -> None:
    if len(given) != len(prepared):
        return
    for (_, image, chosen), item in zip(given, prepared, strict=True):
        values = item["pixel_values"]
        grid = item.get("image_grid_thw")
        name = digest(image, sorted(chosen.items()), options, values.shape, values.dtype, str(grid))
        if name is not None:
            item["fingerprint"] = name
