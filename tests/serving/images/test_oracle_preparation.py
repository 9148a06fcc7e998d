"""Prepared as LMDeploy does it and as turbofit has it done: the same bits, tokens and errors."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.front_ends import CHECKPOINTS
from tests.support.serving import needs
from tests.sweep import sweep
from turbofit.memory.versions import release
from turbofit.serving.images.preparation import prepare
from turbofit.serving.images.resize import quicken

needs("lmdeploy", "torchvision")
pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

#: LLaVA-NeXT's front end does not start; LLaVA-1.5's fails at each image, or takes all memory, with
#: these versions of Transformers (docs/models.md).
OF_5 = (5,) <= release(version("transformers")) < (5, 21)
BROKEN = {"LlavaNext", "Llava"} if OF_5 else {"LlavaNext"}
FAMILIES = [n for n in CHECKPOINTS if n.removesuffix("ForConditionalGeneration") not in BROKEN]
FILMS = ("Qwen3", "Glm4v")
#: Families whose engines cast an image's numbers before all else.
CAST_FIRST = ("Qwen2VL", "Qwen2_5_VL")


def drawn(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, so that a value at a wrong place is another value."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), dtype=np.uint16))
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)
    shape = (height, width, channels) if channels else (height, width)
    image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode if channels else "L")
    return image.convert(mode)


def url(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    data = io.BytesIO()
    image.save(data, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter to the right
    return exif


#: The pictures of each request.
REQUESTS = {
    "RGB": [url(drawn(300, 210), "JPEG")],
    "RGBA": [url(drawn(120, 250, "RGBA"))],
    "L": [url(drawn(90, 70, "L"), "JPEG")],
    "P": [url(drawn(64, 99).quantize(17), transparency=3)],
    "CMYK": [url(drawn(101, 57, "CMYK"), "JPEG")],
    "16 bits": [url(drawn(80, 60, "I;16"))],
    "rotated": [url(drawn(160, 80), "JPEG", exif=rotated())],
    "rotated TIFF": [url(drawn(160, 80), "TIFF", exif=rotated())],
    "WebP": [url(drawn(75, 75), "WEBP")],
    "cut off": [url(drawn(200, 200), "JPEG")[:-4000]],
    "1 pixel wide": [url(drawn(1, 150))],
    "too long": [url(drawn(1, 900))],
    "large": [url(drawn(1100, 840), "JPEG")],
    "several": [url(drawn(200, 100 + 60 * n, seed=n)) for n in range(3)],
    "no picture": ["data:image/png;base64,AAAA"],
}


def film() -> dict[str, Any]:
    frames = np.random.default_rng(5).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    metadata = {"total_num_frames": 4, "fps": 2.0, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    return {"type": "video", "data": frames, "video_metadata": metadata}


async def prepared(encoder: Any, urls: list[str], films: int, options: dict[str, Any]) -> Any:
    """What the engine is given for a request; an error's type and text where there is one."""
    from lmdeploy.serve.processors import MultimodalProcessor

    parts = [{"type": "image_url", "image_url": {"url": u, **options}} for u in urls]
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}]
    try:
        messages = await MultimodalProcessor.async_parse_multimodal_item(messages)
        messages[0]["content"] += [film() for _ in range(films)]
        if not encoder._uses_new_preprocess:
            return (await encoder.preprocess(messages))[-1]["content"]
        words = f"a{encoder.model.image_token}b" * len(urls)
        words += f"{getattr(encoder.model, 'video_token', '')}c" * films
        return await encoder.preprocess(messages, words, {})
    except Exception as exc:  # noqa: BLE001 - what fails must fail alike
        return type(exc).__name__, re.sub("0x[0-9a-f]+", "", str(exc))


def same(one: Any, other: Any) -> bool:
    """Whether two results are alike in types, keys, order and each bit."""
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        return torch.equal(one.view(bits), other.view(bits))
    if hasattr(one, "keys"):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(np.all(one == other))


def all_prepared(encoder: Any, films: bool, times: int = 1) -> list[dict[str, Any]]:
    """Each request of `REQUESTS`, all at once, so many times one after the other."""

    async def once() -> dict[str, Any]:
        cases = {name: (urls, 0) for name, urls in REQUESTS.items()}
        if films:
            cases |= {"film": ([], 1), "both": (REQUESTS["RGB"], 1)}
        answers = await asyncio.gather(*(prepared(encoder, *case, {}) for case in cases.values()))
        return dict(zip(cases, answers, strict=True))

    return [asyncio.run(once()) for _ in range(times)]


def as_the_engine_casts(answers: dict[str, Any]) -> None:
    import torch

    for answer in answers.values():
        for item in answer if isinstance(answer, list) else []:
            item["pixel_values"] = item["pixel_values"].to(torch.bfloat16)


@pytest.mark.parametrize("family", sweep(FAMILIES, 4))
def test_every_family_is_prepared_bit_for_bit(encoders, family):
    films = family.startswith(FILMS)
    (plain,) = all_prepared(encoders(family), films)
    if family.startswith(CAST_FIRST):
        as_the_engine_casts(plain)
    encoder = encoders(family)
    assert prepare(encoder, threads=4, cache_bytes=1 << 30) is None
    quicken(encoder.model)
    for found in all_prepared(encoder, films, times=2):  # the second time from what was kept
        assert [name for name in plain if not same(plain[name], found[name])] == []
    served = [name for name, answer in plain.items() if not isinstance(answer, tuple)]
    assert {"RGB", "RGBA", "CMYK", "16 bits", "several", "large"} <= set(served)


@pytest.mark.parametrize("family", ["InternVLChatModel", "Qwen3_5ForConditionalGeneration"])
def test_each_image_has_a_fingerprint_of_its_own(encoders, family):
    """Where TurboMind runs: the same for the same bytes and options, in any company."""
    encoder = encoders(family)
    encoder.model.backend = "turbomind"
    assert prepare(encoder, threads=2, cache_bytes=0) is None
    one, other = REQUESTS["several"][:2]
    data = base64.b64decode(one.partition(",")[2])
    longer = "data:image/png;base64," + base64.b64encode(data + b"behind its end").decode()

    def names(*urls: str, films: int = 0, **options: Any) -> list[bytes | None]:
        found = asyncio.run(prepared(encoder, list(urls), films, options))
        items = found if isinstance(found, list) else found["multimodal"]
        return [item.get("fingerprint") for item in items]

    first, second = names(one, other)
    assert [len(first), len(second), first == second] == [32, 32, False]
    assert names(other, one, other) == [second, first, second]
    if family.startswith("Intern"):
        assert names(one, max_dynamic_patch=1) != [first] != names(one, max_dynamic_patch=2)
    else:
        image, *frames = names(one, films=1)
        assert (image, set(frames)) == (first, {None})  # LMDeploy hashes a film's frames itself
    (third,) = names(longer)
    assert third != first


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl", "qwen3_5"])
def test_turbomind_takes_a_fingerprint_that_is_there(family):
    package = importlib.util.find_spec("lmdeploy").submodule_search_locations[0]
    source = (Path(package) / f"turbomind/models/{family}.py").read_text()
    asked = source.partition("def _resolve_fingerprint(")[2].partition("\n\n\n")[0]
    assert "fp = input_mm.get('fingerprint')" in asked
    assert source.count("_resolve_fingerprint(") == 2


def test_a_changed_bit_is_seen(encoders):
    (plain,) = all_prepared(encoders("InternVLChatModel"), films=False)
    for name in ("RGB", "several"):
        found = [{**image, "pixel_values": image["pixel_values"].clone()} for image in plain[name]]
        assert same(plain[name], found)
        found[-1]["pixel_values"].view(-1)[77] += 1
        assert not same(plain[name], found)
