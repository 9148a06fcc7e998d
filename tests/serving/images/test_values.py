"""A table has the transform's bits, and an image the engine's dtype where it is made."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from tests.serving.images.test_oracle_preparation import drawn, same
from tests.serving.images.test_resize import usable_library
from tests.support.serving import needs
from turbofit.serving.images import values
from turbofit.serving.images.values import TableTransform, look_values_up, with_table

needs("lmdeploy", "torchvision")
pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def quickened_by_library(table: TableTransform) -> None:
    """The library finds what NumPy finds, and one that does not is not used."""
    picture = drawn(64, 48)
    known = table(picture)
    table.use_library(usable_library())
    assert table._look_up is not None
    assert same(table(picture), known)

    def clear(_source: int, pixels: int, _tables: int, target: int) -> None:
        ctypes.memset(target, 0, pixels)  # what was there may be the right values

    table.use_library(SimpleNamespace(look_up_2=clear, look_up_4=clear))
    assert table._look_up is None
    assert same(table(picture), known)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_table_is_used_where_its_bits_are_the_transforms(encoders, dtype):
    """And not where a later step looks at more than a byte, as if a version had another one."""
    import torch
    from torchvision import transforms

    encoder = encoders("InternVLChatModel", dtype)
    own = encoder.model.transform
    look_values_up(encoder.model)
    assert isinstance(encoder.model.transform, TableTransform)
    for mode in ("RGB", "RGBA", "L", "P"):
        image = drawn(448, 448, mode)
        assert same(encoder.model.transform(image), own(image).to(getattr(torch, dtype)))
    for table in (encoder.model.transform, with_table(own, own.transforms, None)):
        quickened_by_library(table)
    blurred = transforms.Compose([*own.transforms, transforms.GaussianBlur(3)])
    assert with_table(blurred, blurred.transforms, torch.bfloat16) is blurred


@pytest.mark.parametrize("backend", ["pytorch", "turbomind", "another"])
def test_an_image_has_the_engines_dtype_where_that_casts_it_first(monkeypatch, backend):
    """Both engines' files of this LMDeploy are read; a file that is gone leaves its float32."""
    import torch
    from lmdeploy.vl.model.qwen2 import Qwen2VLModel

    def made(method: str = "gptq") -> torch.dtype:
        model = Qwen2VLModel.__new__(Qwen2VLModel)
        processor = SimpleNamespace(preprocess=lambda: {"pixel_values": torch.ones(4, 1176)})
        model.backend, model.mm_feature_dtype = backend, torch.bfloat16
        model.processor = SimpleNamespace(image_processor=processor)
        model.hf_config = SimpleNamespace(quantization_config={"quant_method": method})
        values.cast_early(model)
        return processor.preprocess()["pixel_values"].dtype

    casts = values._CASTS["Qwen2VLModel"]
    assert made() == (torch.bfloat16 if backend in casts else torch.float32)
    # The PyTorch engine computes in float16 then, whatever the checkpoint's dtype is.
    assert made("awq") == (torch.bfloat16 if backend == "turbomind" else torch.float32)
    gone = {name: (("gone.py", *files), *rest) for name, (files, *rest) in casts.items()}
    monkeypatch.setitem(values._CASTS, "Qwen2VLModel", gone)
    assert made() == torch.float32
