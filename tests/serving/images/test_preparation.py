"""Where LMDeploy's own way stays, and what threads must not do to each other."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tests.support.serving import needs
from tests.support.waiting import HANG
from turbofit.core.plan import image_threads
from turbofit.core.process.imports import unlike
from turbofit.serving.images import preparation

needs("lmdeploy", "torchvision")
pytestmark = [pytest.mark.lmdeploy, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def encoder():
    """LMDeploy's, with a front end of whose functions all are known and none is called."""
    from lmdeploy.vl.engine import ImageEncoder
    from lmdeploy.vl.model.qwen3 import Qwen3VLModel

    made, model = ImageEncoder.__new__(ImageEncoder), Qwen3VLModel.__new__(Qwen3VLModel)
    made.executor, made._uses_new_preprocess, made.model = ThreadPoolExecutor(1), False, model
    model.processor = SimpleNamespace(tokenizer=None)
    return made


@pytest.mark.parametrize(
    ("cores", "engines", "threads"),
    [(1, 1, 2), (2, 1, 2), (4, 1, 3), (16, 1, 15), (16, 2, 7), (64, 1, 16), (64, 2, 16), (8, 8, 2)],
)
def test_a_core_is_left_to_the_event_loop(cores, engines, threads):
    assert image_threads(cores, engines) == threads


def test_every_function_that_is_replaced_or_shared_is_known():
    from lmdeploy.vl.engine import ImageEncoder
    from lmdeploy.vl.model.base import VISION_MODELS

    assert unlike(ImageEncoder.__init__, preparation._KNOWN) is None
    assert unlike(ImageEncoder.preprocess, preparation._KNOWN) is None
    unknown = {
        name for name, model in VISION_MODELS.module_dict.items()
        if unlike(model.preprocess, preparation._KNOWN)
    }  # fmt: skip
    # Each runs code of a checkpoint's own or of a package that was not read, or runs nowhere.
    assert unknown == {
        "DeepSeekVisionModel", "DeepSeek2VisionModel", "KimiK25VisionModel", "LlavaVisionModel",
        "MiniCPMVModel", "MolmoVisionModel", "Phi3VisionModel",
    }  # fmt: skip


def test_changed_code_stays_as_lmdeploy_has_it(encoder, monkeypatch, capfd):
    own, other = encoder.executor, type(encoder.model)

    def preprocess(self, messages):
        return messages

    monkeypatch.setattr(other, "preprocess", preprocess)
    assert "is not as known" in preparation.prepare(encoder, 4, 0)
    assert encoder.executor is own
    module = SimpleNamespace(ImageEncoder=type("ImageEncoder", (), {"__init__": lambda _: None}))
    preparation._watch_encoders(4, 0, module)
    module.ImageEncoder()
    said = capfd.readouterr().err
    assert said.startswith("turbofit: images: LMDeploy's own way: its ")
    assert said.count("\n") == 1


def test_a_checkpoints_own_code_runs_on_one_thread(encoder):
    own = encoder.executor
    foreign = type("Processor", (), {"__module__": "transformers_modules.phi3"})()
    encoder.model.processor.image_processor = foreign
    assert "checkpoint's repository" in preparation.prepare(encoder, 4, 0)
    assert encoder.executor is own


def test_what_fails_leaves_one_thread_and_the_server_starts(encoder, monkeypatch):
    """A source that is not installed, a processor of another form."""
    own = encoder.executor
    del encoder.model.processor
    assert "no attribute 'processor'" in preparation.prepare(encoder, 4, 1 << 20)
    namespace: dict = {}
    exec("def preprocess(self, messages): ...", namespace)
    monkeypatch.setattr(type(encoder.model), "preprocess", namespace["preprocess"])
    assert preparation.prepare(encoder, 4, 0).startswith("OSError: ")
    assert encoder.executor is own


def test_a_process_that_has_imported_it_prepares_on_several_threads_too(monkeypatch, capfd):
    module = SimpleNamespace(ImageEncoder=type("ImageEncoder", (), {"__init__": lambda _: None}))
    monkeypatch.setitem(sys.modules, "lmdeploy.vl.engine", module)
    monkeypatch.setenv(preparation.THREADS, "4")
    hooks = list(sys.meta_path)
    preparation.install()
    assert sys.meta_path == hooks
    module.ImageEncoder()
    assert capfd.readouterr().err.startswith(preparation.SAYS)


def test_torch_uses_one_core_in_these_threads_alone(encoder):
    import torch

    torch.set_num_threads(3)
    assert preparation.prepare(encoder, 2, 0) is None
    assert encoder.executor.submit(torch.get_num_threads).result() == 1
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (found, torch.get_num_threads()) == ([3], 3)
    torch.set_num_threads(1)


def test_requests_are_prepared_beside_each_other_and_those_that_left_are_not(encoder):
    """Two meet, and others wait; a client that left costs nothing, an error is one's own."""
    both, began, seen = threading.Barrier(2, timeout=HANG), threading.Event(), []

    def preprocess(messages):
        if messages in ("a", "b"):
            both.wait()  # neither ends before the other has begun
            began.set()
            release.wait()
        seen.append(messages)
        if messages == "bad":
            raise ValueError(messages)
        return messages.upper()

    release = threading.Event()
    assert preparation.prepare(encoder, 2, 0) is None
    encoder.model.preprocess = preprocess

    async def drive():
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        first = [asyncio.ensure_future(encoder.preprocess(name)) for name in ("a", "b")]
        await asyncio.to_thread(began.wait)
        rest = [asyncio.ensure_future(encoder.preprocess(n)) for n in ("left", "bad", "c")]
        await asyncio.sleep(0)
        rest[0].cancel()
        await asyncio.sleep(0)
        release.set()
        return await asyncio.gather(*first, *rest, return_exceptions=True)

    a, b, left, bad, c = asyncio.run(drive())
    assert (a, b, c, type(left), str(bad)) == ("A", "B", "C", asyncio.CancelledError, "bad")
    assert sorted(seen) == ["a", "b", "bad", "c"]


def test_one_thread_at_a_time_tokenizes():
    """Transformers' fast tokenizers raise "Already borrowed" else."""
    inside, most = [], []

    class Tokenizer:
        def __call__(self, text):
            return self._encode_plus(text)

        def _encode_plus(self, text):
            inside.append(text)
            most.append(len(inside))
            threading.Event().wait(0.001)
            inside.pop()
            return text

    tokenizer = Tokenizer()
    preparation._lock_tokenizer(SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer, range(40))) == list(range(40))
    assert max(most) == 1
