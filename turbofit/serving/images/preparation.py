"""Has LMDeploy prepare images on several threads, each image once, with the same results.

LMDeploy itself prepares the images of all clients on one thread
(``ThreadPoolExecutor(max_workers=1)`` in ``vl/engine.py``), while torch's threads spin: the GPU
waits for one core. `Launch` puts the settings into the environment of the engine's process. No
module is imported before LMDeploy's own import, so a model without images starts as usual.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.messages import counted
from turbofit.core.process.imports import once_imported, unlike

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.plan import Plan

#: Variables with the number of threads for images, and with the most bytes of kept images.
THREADS: Final = "TURBOFIT_IMAGE_THREADS"
CACHE: Final = "TURBOFIT_IMAGE_CACHE"
#: The beginning of lines in the engine's log for the person who started the server.
SAYS: Final = "turbofit: images: "

_MODULE: Final = "lmdeploy.vl.engine"
#: LMDeploy's functions that run on these threads, and the first digits of their sources' SHA-256,
#: which are equal in 0.16.0, 0.17.0 and 0.18.0. By these sources, no call changes data that
#: another call uses.
_KNOWN: Final = {
    "ImageEncoder.__init__": "40144cf72212",
    "ImageEncoder.preprocess": "8fe21f773a29",
    "VisionModel.preprocess": "f0ad836c0fdc",
    "CogVLMVisionModel.preprocess": "25260c28dde1",
    "GLM4VisionModel.preprocess": "8120aa378341",
    "Gemma3VisionModel.preprocess": "e5ec94994ca9",
    "InternVL3VisionModel.preprocess": "e7b2b6e2e5ea",
    "InternVLVisionModel.preprocess": "9f7141341afd",
    "LLama4VisionModel.preprocess": "dcbce35f7765",
    "LlavaHfVisionModel.preprocess": "0b856eff816c",
    "LlavaNextVisionModel.preprocess": "1a498e5a6b27",
    "Qwen2VLModel.preprocess": "231a75361fd8",
}
#: Seconds for which a thread keeps Python's lock while another thread waits (Python's default is
#: 5 ms): LMDeploy's event loop waits for these threads at each step.
_SWITCH_SECONDS: Final = 0.0005
#: LMDeploy's backends that recognise an image by a hash of its pixels.
_HASHING: Final = frozenset(("turbomind",))
#: Parts of a processor that run on these threads without a lock.
_PARTS: Final = ("image_processor", "video_processor", "feature_extractor")


def image_environment(plan: Plan) -> dict[str, str]:
    """Return the variables for the preparation of images in an engine's process.

    Empty if the plan has no images.
    """
    if plan.promise.limits.vision_unit is None or not plan.backend.of_lmdeploy:
        return {}
    return {THREADS: str(threads_here(plan)), CACHE: str(plan.host.image_cache)}


def threads_here(plan: Plan) -> int:
    """Return the number of threads for images: the plan's number, or a number for this host."""
    from turbofit.core.plan import image_threads
    from turbofit.core.struct import known
    from turbofit.machine.host import read_host

    if plan.host.image_threads is not None:
        return plan.host.image_threads
    return image_threads(known(read_host().cpus, 1), plan.replicas)


def install() -> None:
    """Have each model of this process prepare its images with the environment's settings."""
    threads = int(os.environ.pop(THREADS, "1"))
    cache_bytes = int(os.environ.pop(CACHE, "0"))
    if threads <= 1:
        return
    once_imported(_MODULE, partial(_watch_encoders, threads, cache_bytes))


def _watch_encoders(threads: int, cache_bytes: int, module: Any) -> None:
    """Change each ``ImageEncoder`` of LMDeploy's module, and log the way of preparation."""
    make = module.ImageEncoder.__init__

    from turbofit.serving.images.resize import quicken

    @wraps(make)  # so that `unlike` still finds the source of LMDeploy's function
    def made(encoder: Any, *arguments: Any, **keywords: Any) -> None:
        """Make LMDeploy's encoder, then change its preparation of images."""
        make(encoder, *arguments, **keywords)
        why = prepare(encoder, threads, cache_bytes)
        done = (
            f"prepared on {counted(threads, 'thread')}"
            if why is None
            else f"LMDeploy's own way: {why}"
        )
        if why is None:
            done = ", ".join(filter(None, (done, quicken(encoder.model))))
        sys.stderr.write(f"{SAYS}{done}\n")

    module.ImageEncoder.__init__ = made


def prepare(encoder: Any, threads: int, cache_bytes: int) -> str | None:
    """Have an ``ImageEncoder`` prepare images on ``threads`` threads.

    Return the reason if this is not possible, else None. Prepared images are kept up to
    ``cache_bytes``; 0 keeps none. After an error LMDeploy keeps its one thread.
    """
    try:
        return _prepare(encoder, threads, cache_bytes)
    except Exception as exc:  # noqa: BLE001 - a server must not fail for being slower
        return f"{type(exc).__name__}: {exc}"


def _prepare(encoder: Any, threads: int, cache_bytes: int) -> str | None:
    """Do the work of `prepare`, without catching errors."""
    import torch

    why = unlike(type(encoder).__init__, _KNOWN) or unlike(type(encoder).preprocess, _KNOWN)
    if why is not None:
        return why
    model = encoder.model
    if model is None:
        return "the model has no images"
    why = unlike(type(model).preprocess, _KNOWN) or _foreign(model)
    if why is not None:
        return why
    from turbofit.serving.images.cache import name_images, with_fingerprints
    from turbofit.serving.images.values import cast_early, look_values_up

    look_values_up(model)
    cast_early(model)
    _lock_tokenizer(model)
    name_images()
    if getattr(model, "backend", None) in _HASHING:
        model.preprocess = with_fingerprints(model)
    if cache_bytes:
        from turbofit.serving.images.cache import ImageCache, keep_prepared

        keep_prepared(model, ImageCache(cache_bytes))
    others = torch.get_num_threads()
    sys.setswitchinterval(_SWITCH_SECONDS)
    encoder.executor = ThreadPoolExecutor(
        threads, "image", initializer=_use_one_core, initargs=(others,)
    )
    encoder.preprocess = _with_one_core(encoder.preprocess, others)
    return None


def _foreign(model: Any) -> str | None:
    """Return the reason if a model's processor may not run on several threads, else None.

    Code of the checkpoint's own repository may keep state between calls.
    """
    processor = getattr(model, "processor", None)
    parts = [processor, *(getattr(processor, part, None) for part in _PARTS)]
    if any(type(part).__module__.startswith("transformers_modules") for part in parts):
        return "the processor is code of the checkpoint's repository"
    return None


def _lock_tokenizer(model: Any) -> None:
    """Let one thread at a time use a processor's tokenizer: each call changes its state."""
    tokenizer = getattr(getattr(model, "processor", None), "tokenizer", None)
    lock = threading.RLock()
    for name in ("_encode_plus", "_batch_encode_plus"):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, _locked(getattr(tokenizer, name), lock))


def _locked(function: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    """Wrap a function so that one thread at a time calls it."""

    def alone(*arguments: Any, **keywords: Any) -> Any:
        with lock:
            return function(*arguments, **keywords)

    return alone


def _with_one_core(preprocess: Callable[..., Any], others: int) -> Callable[..., Any]:
    """Wrap ``preprocess`` so that torch uses one core also in the event loop's thread."""
    set_up = threading.local()

    async def preprocess_here(*arguments: Any, **keywords: Any) -> Any:
        if not hasattr(set_up, "done"):
            set_up.done = True
            _use_one_core(others)
        return await preprocess(*arguments, **keywords)

    return preprocess_here


def _use_one_core(others: int) -> None:
    """Let torch use one core in this thread, and ``others`` cores in threads that begin later.

    `torch.set_num_threads` changes the number for this thread and for later threads. So this thread
    sets 1, and then a short-lived thread sets ``others`` for later threads.
    """
    import torch

    torch.get_num_threads()  # a first reading after the change would undo the change
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(others,))
    # At the limit of pids no thread starts, and later threads have one core until the next call.
    # That is better than an error, which would end the preparation of images for ever.
    with suppress(RuntimeError):
        restore.start()
        restore.join()
