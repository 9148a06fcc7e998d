"""Our library resizes as Pillow does, to the byte, or Pillow does it itself, and a line says so."""

from __future__ import annotations

import ctypes
import io
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.serving import needs
from turbofit.core import installation
from turbofit.serving.images import preparation, resize
from turbofit.serving.images.resize import Resizer, replace_resize
from turbofit.serving.images.values import NotUsableError, Pixels, open_library

needs("numpy", "PIL")

PILLOW = Image.Image.resize
SIZES = [(1, 50), (50, 1), (2, 80), (90, 2), (3, 3), (33, 47), (101, 64), (64, 333), (300, 21)]
NEW = [(1, 1), (3, 7), (4, 4), (16, 200), (448, 448), (61, 48), (201, 33), (896, 32), (90, 171)]


def usable_library() -> Any:
    """The library; only a machine that cannot run it skips the test."""
    try:
        return open_library()
    except NotUsableError as exc:
        if "x86-64" in str(exc) or "AVX2" in str(exc):
            pytest.skip(str(exc))
        raise


@pytest.fixture(scope="module")
def library() -> Any:
    return usable_library()


@pytest.fixture(autouse=True)
def pillow(monkeypatch):
    """Pillow as it is, before the test and after it."""
    monkeypatch.setattr(Image.Image, "resize", PILLOW)
    yield
    Image.core.set_use_block_allocator(0)


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise with many bytes at their least and most, where sums leave a byte's range."""
    rng = np.random.default_rng(width * height)
    noise = rng.integers(-200, 456, (height, width, 3)).clip(0, 255)
    return Image.fromarray(noise.astype(np.uint8)).convert(mode)


def raw(image: Image.Image) -> bytes:
    """All bytes, the unused ones too."""
    return image.tobytes("raw", "RGBX") if image.mode == "RGB" else image.tobytes()


def alike(image: Image.Image, *arguments: Any, **options: Any) -> bool:
    one, other = image.resize(*arguments, **options), PILLOW(image, *arguments, **options)
    same = (one.mode, one.size, one.info) == (other.mode, other.size, other.info)
    return same and raw(one) == raw(other)


def test_every_size_has_pillows_bytes(library):
    replace_resize(library)
    replace_resize(library)  # once
    assert Image.Image.resize.__wrapped__ is PILLOW
    assert [(old, new) for old in SIZES for new in NEW if not alike(drawn(*old), new)] == []


def test_both_orders_of_passes_are_pillows_to_the_pixel(library):
    """Pillow 13 begins with the columns where more than twice as much height as width is lost."""
    replace_resize(library)
    for lost in (-3, 0, 1, 9):
        for more in (-1, 0, 1):
            assert alike(drawn(70, 90), (70 - lost, 90 - 2 * lost - more)), (lost, more)


def test_pictures_above_16_mb_are_resized_where_they_lie(library, monkeypatch):
    large = Image.frombytes("RGB", (2100, 2000), np.random.default_rng(0).bytes(3 * 2100 * 2000))
    assert Pixels(large.im).address is None  # Pillow has them in pieces
    replace_resize(library)
    assert alike(large, (448, 448))  # by Pillow itself
    monkeypatch.setattr(resize, "Pixels", lambda core: seen.append(Pixels(core)) or seen[-1])
    seen: list[Pixels] = []
    assert alike(large.copy(), (448, 448))
    assert None not in [pixels.address for pixels in seen]


def test_what_the_library_does_not_know_is_pillows(library):
    replace_resize(library)
    calls = []
    resizer = Resizer(library, Image.__version__)
    resizer._library = SimpleNamespace(resize=lambda *words: calls.append(words))
    Image.Image.resize = resizer.instead_of(PILLOW)
    for mode in ("RGBA", "L", "P", "CMYK", "I;16", "1", "YCbCr", "LA"):
        picture = Image.new(mode, (40, 30)) if mode == "I;16" else drawn(40, 30, mode)
        assert alike(picture, (20, 25)), mode
    picture = drawn(40, 30)
    for name in Image.Resampling:
        assert name == Image.Resampling.BICUBIC or alike(picture, (20, 25), name)
    assert alike(picture, (20, 25), box=(1, 2, 30, 30))
    assert alike(picture, (9, 9), reducing_gap=2.0)
    assert alike(picture, picture.size)
    assert alike(picture, [20, 25])
    assert not calls
    assert alike(picture, (20, 25))  # the library answers None here: no memory
    assert len(calls) == 1


def test_a_picture_that_is_cut_off_has_pillows_error(library, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)  # as LMDeploy does not
    replace_resize(library)
    data = io.BytesIO()
    drawn(200, 200).save(data, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(data.getvalue()[:-4000])).resize((20, 20))


class Wrong:
    """The library, but for one bit of one byte."""

    def __init__(self, library: Any, **words: Any) -> None:
        self._library = library
        self.look_up_2, self.look_up_4 = library.look_up_2, library.look_up_4

    def resize(self, *words: Any) -> int:
        done = self._library.resize(*words)
        ctypes.cast(words[3], ctypes.POINTER(ctypes.c_uint8))[8] ^= 1
        return done


def test_a_library_that_differs_by_a_bit_is_not_used(library):
    with pytest.raises(NotUsableError, match="other bytes"):
        replace_resize(Wrong(library))
    assert Image.Image.resize is PILLOW
    Image.Image.resize = Resizer(Wrong(library), Image.__version__).instead_of(PILLOW)
    assert not alike(drawn(64, 64), (32, 32))  # so a changed bit is seen


@pytest.mark.parametrize("version", ["11.2.1", "13.1.0", "14.0"])
def test_another_pillow_is_not_as_known(version):
    with pytest.raises(NotUsableError, match=f"the code of Pillow {version} is unknown"):
        Resizer(SimpleNamespace(), version)


def said(model: Any, capfd: Any) -> str:
    """What the log of an engine with this model has."""
    module = SimpleNamespace(ImageEncoder=type("ImageEncoder", (), {"__init__": lambda _: None}))
    module.ImageEncoder.model = model
    preparation._watch_encoders(4, 0, module)
    module.ImageEncoder()
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    return line.removeprefix(preparation.SAYS).strip()


def test_the_start_says_which_way_is_used(library, monkeypatch, capfd):
    monkeypatch.setattr(preparation, "prepare", lambda *_: None)
    tiles, none = SimpleNamespace(transform=None), SimpleNamespace()
    assert said(none, capfd) == "prepared on 4 threads"
    assert Image.Image.resize is PILLOW
    assert said(tiles, capfd) == "prepared on 4 threads, resized with AVX2"


@pytest.fixture
def copied(library, tmp_path, monkeypatch):
    """The installed library in a folder of the test; nothing has loaded this copy."""
    for path in installation._LIBRARY.parent.glob("*pixels.*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(installation, "_LIBRARY", tmp_path / "libpixels.so")
    monkeypatch.setattr(preparation, "prepare", lambda *_: None)
    return installation.image_library()


def test_no_start_compiles_the_library(copied, tmp_path, monkeypatch, capfd):
    copied.unlink()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = said(SimpleNamespace(image_transform=None), capfd)
    begin = f"prepared on 4 threads, resized by Pillow alone: {copied} cannot be read: No such file"
    assert line.startswith(f"{begin} or directory (apt install gcc libc6-dev")
    assert "pip install --force-reinstall --no-deps" in line
    assert Image.Image.resize is PILLOW
    assert sorted(tmp_path.iterdir()) == before
