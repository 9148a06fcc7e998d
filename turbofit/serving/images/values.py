"""Makes pixel values in fewer steps, and casts them to the engine's dtype before they are sent.

torchvision's last steps (``ToTensor``, ``Normalize``) and the cast to the engine's dtype map each
byte to one of 256 numbers for each channel. A table has the results of these steps for all bytes.
If an engine begins with a cast of pixel values, the thread that prepares an image casts them here.
"""

from __future__ import annotations

import ctypes
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import PackageError
from turbofit.core.installation import image_library

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Sequence

    import torch

#: Bytes of a pixel in Pillow's memory.
_PIXEL: Final = 4
#: The number of values of a byte.
_BYTES: Final = 256
#: The size of a picture on which a table is tested before it is used.
_TRIED: Final = (61, 47)
#: LMDeploy's models with float32 pixel values. For each backend: the files that read these values;
#: the cast to the engine's dtype, which each of these files contains once, before the tower; and
#: the quantisations with which the engine's dtype is not the checkpoint's.
#: Source: lmdeploy pytorch/config.py::_update_torch_dtype `quant_method == 'awq'`
_CASTS: Final = {
    "Qwen2VLModel": {
        "pytorch": (
            ("pytorch/models/qwen2_vl.py", "pytorch/models/qwen2_5_vl.py"),
            "pixel_values = pixel_values.to(dtype)",
            ("awq",),
        ),
        "turbomind": (
            ("turbomind/models/qwen2_vl.py",),
            "to_tm_tensor(\n                input_mm['pixel_values'], dtype=self._ctx.dtype)",
            (),
        ),
    },
}
_described: Any = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class NotUsableError(Exception):
    """The library cannot be used: Pillow and NumPy do the work themselves."""


def open_library() -> ctypes.CDLL:
    """Load the library that the installation compiled.

    Raises:
        NotUsableError: the library is missing, is damaged, or cannot run on this machine.
    """
    try:
        library = ctypes.CDLL(str(image_library()))
    except PackageError as exc:
        raise NotUsableError(f"{exc.message} ({exc.hint})" if exc.hint else exc.message) from None
    except OSError as exc:
        raise NotUsableError(f"the library cannot be loaded: {exc}") from None
    if not library.usable():
        raise NotUsableError("this processor has no AVX2")
    address, size = ctypes.c_void_p, ctypes.c_int
    library.resize.argtypes = (address, size, size, address, size, size, size)
    for look_up in (library.look_up_2, library.look_up_4):
        look_up.argtypes = (address, ctypes.c_size_t, address, address)
    return library


class _Array(ctypes.Structure):
    """Arrow's description of an array in memory, which Pillow returns.

    Source: Apache Arrow, The Arrow C data interface: struct ArrowArray
    """


_Array._fields_ = (
    *((name, ctypes.c_int64) for name in ("length", "nulls", "offset", "buffers", "children")),
    ("buffer", ctypes.POINTER(ctypes.c_void_p)),
    ("child", ctypes.POINTER(ctypes.POINTER(_Array))),
)


class Pixels:
    """A picture's pixels in RGB, which stay in place while this object lives.

    ``address`` is the address of the first pixel; the rows follow one another. None if the pixels
    are not in one piece.
    """

    def __init__(self, core: Any) -> None:
        self.address: int | None = None
        try:
            self._capsule = core.__arrow_c_array__()
        except ValueError:
            return
        # The address counts only if one array has all bytes, without gaps.
        array = _Array.from_address(_described(self._capsule, b"arrow_array"))
        if array.children == 1:
            values = array.child[0][0]
            width, height = core.size
            if values.length == width * height * _PIXEL and values.buffers == 2:
                self.address = values.buffer[1]


def look_values_up(model: Any) -> None:
    """Have a model of LMDeploy look pixel values up in a table, if the model has a transform."""
    casts = getattr(model, "mm_feature_dtype", None)
    for name, dtype in (("transform", casts), ("image_transform", None)):
        steps = getattr(getattr(model, name, None), "transforms", None)
        if steps is not None:
            setattr(model, name, with_table(getattr(model, name), steps, dtype))


def cast_early(model: Any) -> None:
    """Have the thread that prepares an image cast the values to the engine's dtype.

    The engine itself casts values in its event loop or its process, where all requests wait.
    """
    dtype = getattr(model, "mm_feature_dtype", None)
    casts = _CASTS.get(type(model).__name__, {}).get(getattr(model, "backend", ""))
    if dtype is None or casts is None:
        return
    files, cast, of_another_dtype = casts
    method = (getattr(model.hf_config, "quantization_config", None) or {}).get("quant_method")
    if method in of_another_dtype or not _each_has(files, cast):
        return
    processor = model.processor.image_processor
    prepare = processor.preprocess

    @wraps(prepare)
    def cast_here(*arguments: Any, **options: Any) -> Any:
        prepared = prepare(*arguments, **options)
        prepared["pixel_values"] = prepared["pixel_values"].to(dtype)
        return prepared

    processor.preprocess = cast_here


def _each_has(files: Sequence[str], cast: str) -> bool:
    """Return whether each of these files of LMDeploy contains the cast exactly once."""
    spec = find_spec("lmdeploy")
    if spec is None or spec.origin is None:
        return False
    paths = [Path(spec.origin).parent / file for file in files]
    return all(path.is_file() and path.read_text("utf-8").count(cast) == 1 for path in paths)


def with_table(transform: Any, steps: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Return a transform with a table for its last steps; unchanged if the table gives other bits.

    ``dtype`` is the dtype of the engine's cast; None keeps the transform's own dtype.
    """
    import torch

    cut = next((i for i, step in enumerate(steps) if type(step).__name__ == "ToTensor"), None)
    if cut is None:
        return transform
    tried = _trial_picture()
    try:
        table = TableTransform(steps[:cut], steps[cut:], dtype)
        alike = torch.equal(table(tried), transform(tried).to(table.dtype))
    except (RuntimeError, ValueError, TypeError, KeyError):  # no table can replace these steps
        return transform
    return table if alike else transform


def _trial_picture() -> Any:
    """Return a picture of random pixels."""
    import numpy as np
    from PIL import Image

    width, height = _TRIED
    pixels = np.random.default_rng(0).integers(0, _BYTES, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TableTransform:
    """A transform that makes the shape of an image by steps, and its pixel values by a table.

    ``shaping`` are the steps for the shape. The table has the results of the later steps,
    ``numbering``, for a picture with every value of a byte.
    """

    def __init__(
        self, shaping: Sequence[Any], numbering: Sequence[Any], dtype: torch.dtype | None
    ) -> None:
        import numpy as np
        import torch
        from PIL import Image

        self._shaping, self._numbering = shaping, numbering
        ramp: Any = np.arange(_BYTES, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        values = self._numbers(Image.fromarray(ramp))
        self.dtype = dtype or values.dtype
        values = values.reshape(3, _BYTES).to(self.dtype)
        # The table has integers with the bits of floats, since numpy lacks some types of floats.
        bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
        self._tables = values.view(bits).numpy()
        self._look_up: Callable[..., None] | None = None

    def use_library(self, library: ctypes.CDLL) -> None:
        """Have the compiled library look values up, if its results equal the table's."""
        import torch

        tried = _trial_picture()
        known = self(tried)
        self._look_up = {2: library.look_up_2, 4: library.look_up_4}[known.element_size()]
        if not torch.equal(self(tried), known):
            self._look_up = None

    def __call__(self, image: Any) -> torch.Tensor:
        """Return the image's values, of shape (3, height, width)."""
        import numpy as np
        import torch

        for step in self._shaping:
            image = step(image)
        if image.mode != "RGB":
            return self._numbers(image).to(self.dtype)
        width, height = image.size
        bits = np.empty((3, height, width), self._tables.dtype)
        self._fill(bits, image)
        return torch.from_numpy(bits).view(self.dtype)

    def _fill(self, bits: Any, image: Any) -> None:
        """Fill ``bits`` with an image's values, by the library if possible, else by NumPy."""
        import numpy as np

        if self._look_up is not None:
            image.load()
            source = Pixels(image.im)
            if source.address is not None:
                count = image.width * image.height
                tables = self._tables.ctypes.data
                self._look_up(source.address, count, tables, bits.ctypes.data)
                return
        pixels = np.asarray(image)
        for channel, table in enumerate(self._tables):
            np.take(table, pixels[:, :, channel], out=bits[channel], mode="clip")

    def _numbers(self, image: Any) -> Any:
        """Apply the transform's own last steps to an image."""
        for step in self._numbering:
            image = step(image)
        return image
