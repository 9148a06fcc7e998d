"""Lists the rows of the bench: settings that are predicted and then run on pretend GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One start of the engine, with its requests.

    ``units``: an image request for each, of this number of tiles or this patch grid (h, w).
    ``queued``: for each, this number of requests of the second unit (or the only one) at once.
    ``packing``: awq or fp8, for a folder with the model of a 16-bit preset in this quantisation.
    """

    model: str
    on: str
    tp: int = 1
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed
    units: tuple[Any, ...] = ()
    queued: tuple[int, ...] = ()
    long: bool = False
    sampling: bool = False
    packing: str = ""

    @property
    def name(self) -> str:
        """A short name for tables."""
        changed = " ".join(f"{k}={v}" for k, v in self.settings.items())
        model = f"{self.model}-{self.packing}" if self.packing else self.model
        return f"{model} tp{self.tp} {self.on} {changed}".strip()


TILES = (1, 6, 13, 25, 40)
PATCHES = ((78, 138), (150, 200), (256, 256))
#: Pages of documents: MinerU's square of 1036, A4 with 1288 pixels along it, MinerU2.5's most.
PAGES = ((74, 74), (92, 66), (64, 128))
#: Qwen3.5's patches of 16: about 1,700 x 1,200 pixels, 2,048 squared, and its default limit.
SQUARES = ((74, 106), (128, 128), (192, 256))


#: Short names of settings, in the order in which rows name them.
_SHORT = {"prefill": "max_prefill_token_num", "batch": "max_batch_size", "session": "session_len",
          "ratio": "cache_max_entry_count"}  # fmt: skip


def row(model: str, on: str, **words: Any) -> Row:
    """Make a row; keywords that are no fields of `Row` are settings."""
    fields = {name: words.pop(name) for name in Row._fields if name in words}
    settings = {_SHORT.get(name, name): value for name, value in words.items()}
    return Row(model, on, settings=settings, **fields)


ROWS: tuple[Row, ...] = (
    # InternVL2, all sizes and degrees
    row("internvl2-1b", "1xrtx3090", units=TILES, queued=(8,), long=True, sampling=True),
    row("internvl2-1b", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    row("internvl2-2b", "1xrtx3060", units=TILES, queued=(8,), sampling=True, ratio=0.5),
    row("internvl2-2b", "2xrtx3060", tp=2, units=TILES, queued=(8,), long=True),
    row("internvl2-8b", "1xrtx3090", units=(1, 6, 13, 25), queued=(4, 8), long=True, sampling=True,
        ratio=0.6),
    row("internvl2-8b", "2xrtx3090", tp=2, units=TILES, queued=(4, 8), long=True),
    row("internvl2-8b", "4xrtx3090", tp=4, units=(*TILES, 100), queued=(4, 8), sampling=True),
    row("internvl2-8b", "4xa100-40g", tp=4, units=TILES, queued=(8,), communicator="cuda-ipc"),
    row("internvl2-8b", "8xa100-40g", tp=8, units=(13, 40), queued=(8,)),
    row("internvl2-26b", "4xrtx3090", tp=4, units=TILES, queued=(4,)),
    row("internvl2-26b", "2xa100-40g", tp=2, units=(13, 40), queued=(4,)),
    row("internvl2-40b", "4xrtx3090", tp=4, units=(13, 25), prefill=2048, ratio=0.3),
    row("internvl2-76b", "8xa100-40g", tp=8, units=(13, 40)),
    # AWQ
    row("internvl2-2b-awq", "1xrtx3060", units=(1, 13), queued=(4,)),
    row("internvl2-8b-awq", "1xrtx3090", units=TILES, queued=(8,)),
    row("internvl2-26b-awq", "2xrtx3090", tp=2, units=TILES, queued=(4,)),
    row("internvl2-40b-awq", "2xrtx3090", tp=2, units=(13, 25), ratio=0.5),
    row("internvl2-76b-awq", "4xrtx3090", tp=4, units=(13, 25), ratio=0.5),
    row("qwen2-vl-2b-awq", "4xrtx3090", tp=4, units=PATCHES, queued=(3,)),
    row("qwen2-vl-7b-awq", "1xrtx3090", units=PATCHES, ratio=0.6),
    row("qwen2.5-7b-awq", "2xrtx3090", tp=2, long=True),
    row("internvl2-8b-awq", "1xh100", units=(13,)),
    row("internvl2-8b-awq", "1xv100-32g", units=(13,)),
    # InternVL3
    row("internvl3-8b", "1xrtx3090", units=(13, 25), queued=(4,), ratio=0.6),
    # Intern-S1, and InternVL3 and 3.5 of other sizes
    row("intern-s1-mini", "1xrtx3090", units=(1, 6, 13), queued=(4,), long=True, ratio=0.5),
    row("intern-s1-mini", "1xl40s", units=TILES, queued=(8,), sampling=True),
    row("intern-s1-mini", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    row("intern-s1-mini", "4xl4", tp=4, units=TILES, queued=(8,), long=True),
    row("internvl3-1b", "1xrtx3060", units=TILES, queued=(8,)),
    row("internvl3-2b", "1xt4", units=TILES, ratio=0.5),
    row("internvl3-14b", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    row("internvl3-38b", "4xl40s", tp=4, units=TILES, queued=(8,)),
    row("internvl3-38b-awq", "1xl40s", units=TILES, queued=(4,)),
    row("internvl3-78b", "8xa100-40g", tp=8, units=(13, 40)),
    row("internvl3-8b-hf", "1xrtx3090", units=(13,), queued=(4,), ratio=0.6),
    row("internvl3.5-1b", "1xrtx3060", units=TILES, queued=(8,), long=True),
    row("internvl3.5-2b", "1xrtx3060", units=TILES, queued=(8,), ratio=0.5),
    row("internvl3.5-4b", "1xrtx4090", units=TILES, queued=(8,), ratio=0.6),
    row("internvl3.5-8b", "1xrtx4090", units=(1, 6, 13), queued=(4,), ratio=0.5),
    row("internvl3.5-14b", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    row("internvl3.5-38b", "4xl40s", tp=4, units=TILES, queued=(8,), sampling=True),
    # prefill, batch, session, KV quantisation, phases, dtype
    row("internvl2-8b", "1xrtx3090", units=(13, 25), prefill=1024, batch=8),
    row("internvl2-8b", "1xrtx3090", units=(13, 25), queued=(8,), prefill=2048, batch=32),
    row("internvl2-8b", "1xa100-40g", units=(13, 40), queued=(8,), prefill=16384),
    row("internvl2-8b", "1xrtx3090", units=(13,), batch=1, ratio=0.7),
    row("internvl2-8b", "1xa100-40g", units=(13,), sampling=True, batch=1024, prefill=1024,
        session=4096),
    row("internvl2-8b", "4xrtx3090", tp=4, sampling=True, batch=1024, prefill=1024, session=4096),
    row("internvl2-8b", "1xrtx3090", units=(13,), session=8192, ratio=0.6),
    row("internvl2-8b", "1xrtx3090", units=(13,), quant_policy=8, ratio=0.6),
    row("internvl2-8b", "2xrtx3090", tp=2, units=(13,), quant_policy=4),
    row("internvl2-8b", "1xrtx3090", units=(13,), async_=0, ratio=0.6),
    row("internvl2-8b", "1xrtx3090", units=(13,), dtype="float16", ratio=0.6),
    row("internvl2-8b", "1xv100-32g", units=(13, 25), queued=(4,)),
    row("internvl2-2b", "1xt4", units=(13,), ratio=0.5),
    row("internvl2-8b", "1xl40s", units=(13, 40), queued=(8,)),
    row("internvl2-8b", "1xh100", units=(13, 40), queued=(8,)),
    row("internvl2-8b", "1xrtx5090", units=(13, 40), queued=(8,)),
    # Qwen2-VL and Qwen2.5-VL
    row("qwen2-vl-2b", "1xrtx3090", units=PATCHES, queued=(3,), long=True, ratio=0.6),
    row("qwen2-vl-7b", "1xrtx3090", units=PATCHES, queued=(3,), ratio=0.4),
    row("qwen2-vl-7b", "2xrtx3090", tp=2, units=PATCHES, queued=(3,), ratio=0.6),
    row("qwen2-vl-7b", "4xrtx3090", tp=4, units=PATCHES, queued=(3,), sampling=True),
    row("qwen2-vl-7b", "1xv100-32g", units=PATCHES, ratio=0.6),
    row("qwen2-vl-7b", "1xrtx3090", units=PATCHES, queued=(3,), prefill=2048, ratio=0.4),
    row("qwen2-vl-72b", "8xa100-40g", tp=8, units=PATCHES, ratio=0.6),
    row("qwen2.5-vl-7b", "1xrtx3090", units=PATCHES, queued=(3,), ratio=0.4),
    row("qwen2.5-vl-7b", "4xrtx3090", tp=4, units=PATCHES, queued=(3,)),
    # documents' readers
    row("mineru2.5-1.2b", "1xt4", units=PAGES, queued=(8,), long=True, sampling=True, ratio=0.5),
    row("mineru2.5-1.2b", "1xrtx3060", units=PAGES, queued=(8, 16), ratio=0.5),
    row("mineru2.5-1.2b", "1xrtx4090", units=PAGES, queued=(16,), sampling=True),
    row("mineru2.5-1.2b", "2xrtx3090", tp=2, units=PAGES, queued=(8,), long=True),
    row("mineru2.5-1.2b", "1xv100-32g", units=PAGES, queued=(8,)),
    row("qwen2.5-vl-3b", "1xl4", units=PAGES, queued=(4,), long=True, session=10240, ratio=0.6),
    row("qwen2.5-vl-3b", "1xt4", units=PAGES, session=10240, ratio=0.5),
    row("olmocr-2-7b", "1xl40s", units=PAGES, queued=(8,), long=True, sampling=True, session=16384,
        ratio=0.6),
    row("olmocr-2-7b", "2xrtx3090", tp=2, units=PAGES, queued=(8,), session=16384, ratio=0.6),
    # experts
    row("mixtral-8x7b", "4xa100-40g", tp=4, long=True, sampling=True),
    row("mixtral-8x7b", "2xa100-80g", tp=2, long=True),
    row("mixtral-8x7b", "8xv100-32g", tp=8, sampling=True),
    row("mixtral-8x7b", "2xh100", tp=2, long=True),
    row("qwen3-30b-a3b", "1xa100-80g", long=True, sampling=True, session=32768, ratio=0.7),
    row("qwen3-30b-a3b", "4xrtx3090", tp=4, long=True, session=32768, ratio=0.7),
    row("qwen3-30b-a3b", "1xh100", session=32768, ratio=0.7),
    row("internvl3.5-30b-a3b", "2xa100-40g", tp=2, units=(13, 40), queued=(4,), ratio=0.6),
    row("internvl3.5-30b-a3b", "4xl4", tp=4, units=(13, 40), queued=(4,), batch=64, ratio=0.5),
    # attention to latents, and experts
    row("glm-4.7-flash", "1xa100-80g", long=True, sampling=True, session=32768, ratio=0.7),
    row("glm-4.7-flash", "2xa100-40g", tp=2, long=True, session=32768, ratio=0.7),
    row("glm-4.7-flash", "4xrtx3090", tp=4, session=32768, ratio=0.7),
    row("glm-4.7-flash", "1xh100", session=32768, ratio=0.7),
    # gpt-oss: experts in mxfp4, attention sinks and sliding windows
    row("gpt-oss-20b", "1xrtx3090", long=True, sampling=True, session=32768),
    row("gpt-oss-20b", "1xa10", long=True, quant_policy=8),
    row("gpt-oss-20b", "2xrtx3060", tp=2, long=True),
    row("gpt-oss-20b", "4xl4", tp=4, long=True, sampling=True),
    row("gpt-oss-20b", "1xh100", long=True),
    row("gpt-oss-20b", "4xh100", tp=4, sampling=True, batch=256),
    row("gpt-oss-20b-bf16", "1xa100-80g", long=True, sampling=True),
    row("gpt-oss-20b-bf16", "4xrtx3090", tp=4, long=True),
    row("internvl3.5-gpt-oss-20b-a4b", "1xa100-80g", units=(1, 13, 40), queued=(4,)),
    # gated delta nets
    row("qwen3.5-4b", "1xrtx3090", units=SQUARES, queued=(4,), long=True, sampling=True,
        session=32768, ratio=0.5),
    row("qwen3.5-4b", "2xrtx3090", tp=2, units=SQUARES, queued=(4,), long=True, session=32768,
        ratio=0.7),
    row("qwen3.5-4b", "4xl4", tp=4, units=SQUARES, queued=(4,), session=32768, ratio=0.7),
    row("qwen3.5-4b", "1xv100-32g", units=SQUARES, long=True, session=32768, ratio=0.6),
    row("qwen3.5-4b", "1xh100", units=SQUARES, queued=(4,), long=True, sampling=True, session=32768,
        ratio=0.7),
    row("qwen3.5-4b", "1xrtx5090", units=SQUARES, queued=(4,), long=True, session=32768, ratio=0.6),
    row("qwen3.5-9b", "1xa100-40g", units=SQUARES, queued=(4,), long=True, sampling=True,
        session=32768, ratio=0.6),
    row("qwen3.5-9b", "2xrtx4090", tp=2, units=SQUARES, queued=(4,), session=16384, batch=32,
        ratio=0.6),
    row("qwen3.5-9b", "8xa100-40g", tp=8, units=SQUARES, session=32768, ratio=0.6),
    row("qwen3.5-27b", "2xa100-80g", tp=2, units=SQUARES, queued=(4,), long=True, session=32768,
        ratio=0.7),
    row("qwen3.5-27b", "1xh100", units=SQUARES, long=True, session=32768, batch=64, ratio=0.5),
    row("qwen3.5-4b", "1xv100-16g", session=8192, batch=128),
    row("qwen3.5-35b-a3b", "1xh200", units=SQUARES, long=True, session=32768, ratio=0.7),
    row("qwen3.5-4b", "1xrtx3090", packing="awq", units=SQUARES, long=True, session=32768,
        ratio=0.5),
    row("qwen3.5-4b", "1xh100", packing="awq", units=SQUARES[:1], long=True, session=32768,
        ratio=0.5),
    row("qwen3.5-4b", "1xv100-32g", packing="awq", units=SQUARES[:1], long=True, session=32768,
        ratio=0.5),
    row("qwen3.5-4b", "1xl40s", packing="fp8", units=SQUARES, long=True, session=32768, ratio=0.5),
    row("qwen3.5-4b", "1xh100", packing="fp8", units=SQUARES[:2], queued=(4,), long=True,
        sampling=True, session=32768, ratio=0.5),
    row("qwen3.5-4b", "1xa100-40g", packing="fp8", units=SQUARES[:1], long=True, session=32768,
        ratio=0.5),
    row("qwen3.5-9b", "2xrtx3090", tp=2, packing="awq", units=SQUARES, queued=(4,), session=32768,
        ratio=0.6),
    row("qwen3.5-27b", "4xrtx4090", tp=4, packing="fp8", units=SQUARES[:2], long=True,
        session=32768, ratio=0.6),
    # text only
    row("llama-3.1-8b", "1xrtx3090", long=True, sampling=True, session=32768, ratio=0.6),
    row("qwen2.5-7b", "2xrtx3090", tp=2, long=True),
    row("qwen3-8b", "1xrtx3090", long=True, ratio=0.6),
    # deaths and hangs
    row("internvl2-8b", "1xrtx3090:free=15GiB"),
    row("internvl2-8b", "1xrtx3090", ratio=0.1),
    row("internvl2-8b", "1xrtx3090", ratio=0.95),
    row("internvl2-8b", "1xrtx3090", units=(13,), ratio=0.9),
    row("internvl2-26b-awq", "1xrtx3090"),
    row("internvl2-40b-awq", "1xrtx3090"),
    row("qwen2-vl-7b", "1xrtx3090", units=((100, 100), (256, 256))),
    row("qwen2-vl-72b", "4xrtx3090", tp=4),
    row("internvl2-8b", "1xt4"),
)  # fmt: skip
