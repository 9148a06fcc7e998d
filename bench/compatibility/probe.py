"""One pair of LMDeploy and Transformers: what LMDeploy's front ends do with each checkpoint.

A process of its own with the pair on its path; reads jobs from standard input and writes, for each
family, the first step that failed on each engine, or what the image became. Nothing is computed:
models are built on torch's meta device, TurboMind's binary is a mock behind its Python classes.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

Result = dict[str, Any]

#: Kernels of gated delta nets, compiled for a GPU.
_KERNELS = ("fla", "fla.modules", "fla.modules.convolution", "fla.ops", "fla.ops.gated_delta_rule",
            "causal_conv1d")  # fmt: skip
#: TurboMind's compiled modules, of 0.16 and 0.17 and of 0.18.
_TURBOMIND = ("_turbomind", "_xgrammar", "lmdeploy.turbomind._turbomind",
              "lmdeploy.turbomind._xgrammar")  # fmt: skip


def main() -> int:
    jobs = json.load(sys.stdin)
    answer = io.StringIO()
    with contextlib.redirect_stdout(sys.stderr):  # front ends print
        json.dump(_all(jobs), answer)
    sys.stdout.write(answer.getvalue())
    return 0


def _all(jobs: list[dict[str, Any]]) -> Result:
    try:
        versions = _prepare()
    except Exception as exc:  # noqa: BLE001 - what fails is the answer
        return {"failed": _told("import", exc), "families": {}}
    return {"versions": versions, "families": {job["name"]: _family(job) for job in jobs}}


def _prepare() -> Result:
    """Imports both packages, with stand-ins for what a machine without a GPU lacks."""
    from tests.support.standin.standin_engine import mend_torchvision

    mend_torchvision()
    import torch

    torch.cuda.mem_get_info = lambda *_: (1 << 34, 1 << 34)
    for name in (*_TURBOMIND, *_KERNELS):
        sys.modules[name] = _Binary(name)
    import lmdeploy
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    return {"lmdeploy": lmdeploy.__version__, "transformers": transformers.__version__,
            "torch": torch.__version__}  # fmt: skip


class _Binary(ModuleType):
    """TurboMind's compiled module: whatever is read from it is a mock."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def _family(job: dict[str, Any]) -> Result:
    steps: dict[str, Callable[[dict[str, Any], Result], Any]] = {
        "config": _config, "start": _start, "image": _image
    }  # fmt: skip
    told: Result = {}
    common: Result | None = None
    for name, step in steps.items():
        try:
            told[name] = step(job, told)
        except Exception as exc:  # noqa: BLE001, PERF203 - what fails is the answer
            common = _told(name, exc)
            break
    told.pop("start", None)
    result: Result = {"steps": told}
    for engine in job["engines"]:
        result[engine] = common or _tried(engine, job)
    return result


def _tried(engine: str, job: dict[str, Any]) -> Result | None:
    try:
        {"pytorch": _pytorch, "turbomind": _turbomind}[engine](job)
    except Exception as exc:  # noqa: BLE001 - what fails is the answer
        return _told("class", exc)
    return None


def _told(step: str, exc: Exception) -> Result:
    """The step, the first line of the error, and the innermost line of the two packages."""
    first = (str(exc).strip().splitlines() or [""])[0]
    first = re.sub(r"\S*/(?=[^/\s]+)", "", first)[:160]
    places = [
        f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(exc.__traceback__)
        if "/lmdeploy/" in frame.filename or "/transformers/" in frame.filename
    ]
    package = re.compile(r".*/(?=(?:lmdeploy|transformers)/)")
    where = package.sub("", places[-1]) if places else ""
    return {"step": step, "error": f"{type(exc).__name__}: {first}", "where": where}


def _config(job: dict[str, Any], _: Result) -> Result:
    """The config as LMDeploy's server reads it."""
    from lmdeploy.archs import get_model_arch

    architecture, config = get_model_arch(job["folder"], trust_remote_code=job["trust"])
    if architecture != job["architecture"]:
        raise ValueError(f"read as {architecture}")
    parts = ("text_config", "llm_config", "vision_config")
    return {
        name: type(getattr(config, name)).__name__ for name in parts if hasattr(config, name)
    } | {"class": type(config).__name__}


def _start(job: dict[str, Any], _: Result) -> Any:
    """The front end, with its processor and tokenizer."""
    import torch
    from lmdeploy.vl.model.builder import load_vl_model

    front = load_vl_model(job["folder"], "pytorch", trust_remote_code=job["trust"])
    front.set_mm_feature_dtype(torch.float32)
    return front


def _image(job: dict[str, Any], told: Result) -> Result:
    """One image through the front end: as many tokens, and pixels, as turbofit's rule says."""
    front = told["start"]
    message = {"role": "user", "content": [{"type": "image", "data": _picture(*job["size"])}]}
    if "input_prompt" in inspect.signature(front.preprocess).parameters:
        found = front.preprocess([message], f"a{job['token']}b")
        tokens = found["input_ids"].count(front.image_token_id)
        pixels = found["multimodal"][0]
        pixels = pixels.get("pixel_values", pixels.get("feature", pixels.get("data")))
    else:
        part = front.preprocess([message])[-1]["content"][0]
        tokens, pixels = int(part["image_tokens"]), part["pixel_values"]
    pixels = pixels[0] if isinstance(pixels, list) else pixels
    seen = {
        "tokens": tokens, "shape": list(pixels.shape), "mean": round(float(pixels.mean()), 3),
        "spread": round(float(pixels.std()), 3),
    }  # fmt: skip
    if tokens != job["tokens"]:
        raise ValueError(f"{tokens} image tokens instead of {job['tokens']}")
    if job.get("elements") and pixels.numel() != job["elements"]:
        raise ValueError(f"pixels of shape {seen['shape']} instead of {job['elements']} values")
    return seen


def _picture(width: int, height: int) -> Any:
    """Colours that differ along both sides, so that swapped axes change the mean of a tile."""
    from PIL import Image

    image = Image.new("RGB", (width, height))
    image.putdata([
        (255 * x // width, 255 * y // height, 40) for y in range(height) for x in range(width)
    ])  # fmt: skip
    return image


def _pytorch(job: dict[str, Any]) -> None:
    """The PyTorch engine's model config and its class, on the meta device."""
    import torch
    from lmdeploy.pytorch.backends.cuda.op_backend import CudaOpsBackend
    from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
    from lmdeploy.pytorch.models.patch import build_model_from_hf_config
    from lmdeploy.pytorch.transformers import config_from_pretrained

    for name in ("build_op", "get_layer_impl_builder"):
        if hasattr(CudaOpsBackend, name):
            setattr(CudaOpsBackend, name, classmethod(_unbuilt))
    for module in ("lmdeploy.utils", "lmdeploy.pytorch.configurations.qwen3_5"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module).is_bf16_supported = lambda *_: True
    config = config_from_pretrained(job["folder"], trust_remote_code=job["trust"])
    made = AutoModelConfigBuilder.build(config, job["folder"], tp=1)
    build_model_from_hf_config(made.hf_config or config, torch.bfloat16, torch.device("meta"))


def _unbuilt(*_: Any, **__: Any) -> MagicMock:
    """Kernels need a GPU's libraries; they hold no weights."""
    made = MagicMock()
    for one in (made, made.build.return_value):  # 0.18's operator; what an older builder builds
        del one.build_expert_storage  # of expert parallelism alone
    return made


def _turbomind(job: dict[str, Any]) -> None:
    """TurboMind's table of architectures, and what its converter reads of the config."""
    _imported("lmdeploy.turbomind.models")
    from lmdeploy.messages import TurbomindEngineConfig
    from lmdeploy.turbomind import converter
    from lmdeploy.turbomind.supported_models import is_supported
    from lmdeploy.vl.model.builder import load_vl_model

    if not is_supported(job["folder"], trust_remote_code=job["trust"]):
        raise ValueError("not in TurboMind's table of architectures")
    load_vl_model(job["folder"], "turbomind", trust_remote_code=job["trust"])
    if hasattr(converter, "_get_executable_dtypes"):  # from 0.18 on it looks at the card
        converter._get_executable_dtypes = lambda *_: {"bfloat16", "float16"}
    converter.is_bf16_supported = lambda *_: True
    config = TurbomindEngineConfig()
    config.devices = [0]
    converter.get_tm_config(job["folder"], config, trust_remote_code=job["trust"])


@cache
def _failure(module: str) -> Exception | None:
    """Why a module cannot be imported: a second try would find the half of it and go on."""
    try:
        importlib.import_module(module)
    except Exception as exc:  # noqa: BLE001 - what fails is the answer
        return exc
    return None


def _imported(module: str) -> None:
    failure = _failure(module)
    if failure is not None:
        raise failure


if __name__ == "__main__":
    sys.exit(main())
