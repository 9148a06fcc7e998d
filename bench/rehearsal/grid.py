"""The rows of the bench: what is predicted and then really run on pretend GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One start of the engine, and the requests that it is given.

    ``units``: single requests of so many tiles, or of a patch grid (h, w). ``queued``: so many
    requests of the first unit, queued whole. ``limit`` sets the plan's image limit (tiles or
    pixels); None is what ordinary clients can ask for. ``packing``: awq or fp8 of a model whose
    preset has 16 bits, as a checkpoint's folder.
    """

    model: str
    on: str
    tp: int = 1
    settings: dict[str, Any] = {}  # noqa: RUF012 - never changed
    units: tuple[Any, ...] = ()
    queued: tuple[int, ...] = ()
    long_prompt: bool = False
    sampling: bool = False
    limit: int | None = None
    quick: bool = False
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

ROWS: tuple[Row, ...] = (
    # InternVL2, all sizes and degrees
    Row("internvl2-1b", "1xrtx3090", units=TILES, queued=(8,), long_prompt=True, sampling=True),
    Row("internvl2-1b", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    Row("internvl2-2b", "1xrtx3060", units=TILES, queued=(8,), sampling=True,
        settings={"cache_max_entry_count": 0.5}),
    Row("internvl2-2b", "2xrtx3060", tp=2, units=TILES, queued=(8,), long_prompt=True),
    Row("internvl2-8b", "1xrtx3090", units=(1, 6, 13, 25), queued=(4, 8), long_prompt=True,
        sampling=True, settings={"cache_max_entry_count": 0.6}, quick=True),
    Row("internvl2-8b", "2xrtx3090", tp=2, units=TILES, queued=(4, 8), long_prompt=True),
    Row("internvl2-8b", "4xrtx3090", tp=4, units=(*TILES, 100), queued=(4, 8), sampling=True,
        quick=True),
    Row("internvl2-8b", "4xa100-40g", tp=4, units=TILES, queued=(8,),
        settings={"communicator": "cuda-ipc"}),
    Row("internvl2-8b", "8xa100-40g", tp=8, units=(13, 40), queued=(8,)),
    Row("internvl2-26b", "4xrtx3090", tp=4, units=TILES, queued=(4,)),
    Row("internvl2-26b", "2xa100-40g", tp=2, units=(13, 40), queued=(4,)),
    Row("internvl2-40b", "4xrtx3090", tp=4, units=(13, 25),
        settings={"max_prefill_token_num": 2048, "cache_max_entry_count": 0.3}),
    Row("internvl2-76b", "8xa100-40g", tp=8, units=(13, 40)),
    # AWQ
    Row("internvl2-2b-awq", "1xrtx3060", units=(1, 13), queued=(4,)),
    Row("internvl2-8b-awq", "1xrtx3090", units=TILES, queued=(8,), quick=True),
    Row("internvl2-26b-awq", "2xrtx3090", tp=2, units=TILES, queued=(4,)),
    Row("internvl2-40b-awq", "2xrtx3090", tp=2, units=(13, 25),
        settings={"cache_max_entry_count": 0.5}),
    Row("internvl2-76b-awq", "4xrtx3090", tp=4, units=(13, 25),
        settings={"cache_max_entry_count": 0.5}),
    Row("qwen2-vl-2b-awq", "4xrtx3090", tp=4, units=PATCHES, queued=(3,)),
    Row("qwen2-vl-7b-awq", "1xrtx3090", units=PATCHES, settings={"cache_max_entry_count": 0.6}),
    Row("qwen2.5-7b-awq", "2xrtx3090", tp=2, long_prompt=True),
    Row("internvl2-8b-awq", "1xh100", units=(13,)),
    Row("internvl2-8b-awq", "1xv100-32g", units=(13,)),
    # InternVL3
    Row("internvl3-8b", "1xrtx3090", units=(13, 25), queued=(4,),
        settings={"cache_max_entry_count": 0.6}),
    # Intern-S1, and InternVL3 and 3.5 of other sizes
    Row("intern-s1-mini", "1xrtx3090", units=(1, 6, 13), queued=(4,), long_prompt=True,
        settings={"cache_max_entry_count": 0.5}),
    Row("intern-s1-mini", "1xl40s", units=TILES, queued=(8,), sampling=True),
    Row("intern-s1-mini", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    Row("intern-s1-mini", "4xl4", tp=4, units=TILES, queued=(8,), long_prompt=True),
    Row("internvl3-1b", "1xrtx3060", units=TILES, queued=(8,)),
    Row("internvl3-2b", "1xt4", units=TILES, settings={"cache_max_entry_count": 0.5}),
    Row("internvl3-14b", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    Row("internvl3-38b", "4xl40s", tp=4, units=TILES, queued=(8,)),
    Row("internvl3-38b-awq", "1xl40s", units=TILES, queued=(4,)),
    Row("internvl3-78b", "8xa100-40g", tp=8, units=(13, 40)),
    Row("internvl3-8b-hf", "1xrtx3090", units=(13,), queued=(4,),
        settings={"cache_max_entry_count": 0.6}),
    Row("internvl3.5-1b", "1xrtx3060", units=TILES, queued=(8,), long_prompt=True),
    Row("internvl3.5-2b", "1xrtx3060", units=TILES, queued=(8,),
        settings={"cache_max_entry_count": 0.5}),
    Row("internvl3.5-4b", "1xrtx4090", units=TILES, queued=(8,),
        settings={"cache_max_entry_count": 0.6}),
    Row("internvl3.5-8b", "1xrtx4090", units=(1, 6, 13), queued=(4,),
        settings={"cache_max_entry_count": 0.5}),
    Row("internvl3.5-14b", "2xrtx3090", tp=2, units=TILES, queued=(8,)),
    Row("internvl3.5-38b", "4xl40s", tp=4, units=TILES, queued=(8,), sampling=True),
    # prefill, batch, session, KV quantisation, phases, dtype
    Row("internvl2-8b", "1xrtx3090", units=(13, 25),
        settings={"max_prefill_token_num": 1024, "max_batch_size": 8}),
    Row("internvl2-8b", "1xrtx3090", units=(13, 25), queued=(8,),
        settings={"max_prefill_token_num": 2048, "max_batch_size": 32}),
    Row("internvl2-8b", "1xa100-40g", units=(13, 40), queued=(8,),
        settings={"max_prefill_token_num": 16384}),
    Row("internvl2-8b", "1xrtx3090", units=(13,),
        settings={"max_batch_size": 1, "cache_max_entry_count": 0.7}),
    Row("internvl2-8b", "1xa100-40g", units=(13,), sampling=True,
        settings={"max_batch_size": 1024, "max_prefill_token_num": 1024, "session_len": 4096}),
    Row("internvl2-8b", "4xrtx3090", tp=4, sampling=True,
        settings={"max_batch_size": 1024, "max_prefill_token_num": 1024, "session_len": 4096}),
    Row("internvl2-8b", "1xrtx3090", units=(13,),
        settings={"session_len": 8192, "cache_max_entry_count": 0.6}),
    Row("internvl2-8b", "1xrtx3090", units=(13,),
        settings={"quant_policy": 8, "cache_max_entry_count": 0.6}),
    Row("internvl2-8b", "2xrtx3090", tp=2, units=(13,), settings={"quant_policy": 4}),
    Row("internvl2-8b", "1xrtx3090", units=(13,),
        settings={"async_": 0, "cache_max_entry_count": 0.6}),
    Row("internvl2-8b", "1xrtx3090", units=(13,),
        settings={"dtype": "float16", "cache_max_entry_count": 0.6}),
    Row("internvl2-8b", "1xv100-32g", units=(13, 25), queued=(4,)),
    Row("internvl2-2b", "1xt4", units=(13,), settings={"cache_max_entry_count": 0.5}),
    Row("internvl2-8b", "1xl40s", units=(13, 40), queued=(8,)),
    Row("internvl2-8b", "1xh100", units=(13, 40), queued=(8,)),
    Row("internvl2-8b", "1xrtx5090", units=(13, 40), queued=(8,)),
    # Qwen2-VL and Qwen2.5-VL
    Row("qwen2-vl-2b", "1xrtx3090", units=PATCHES, queued=(3,), long_prompt=True,
        settings={"cache_max_entry_count": 0.6}),
    Row("qwen2-vl-7b", "1xrtx3090", units=PATCHES, queued=(3,), quick=True,
        settings={"cache_max_entry_count": 0.4}),
    Row("qwen2-vl-7b", "2xrtx3090", tp=2, units=PATCHES, queued=(3,),
        settings={"cache_max_entry_count": 0.6}),
    Row("qwen2-vl-7b", "4xrtx3090", tp=4, units=PATCHES, queued=(3,), sampling=True),
    Row("qwen2-vl-7b", "1xv100-32g", units=PATCHES, settings={"cache_max_entry_count": 0.6}),
    Row("qwen2-vl-7b", "1xrtx3090", units=PATCHES, queued=(3,),
        settings={"max_prefill_token_num": 2048, "cache_max_entry_count": 0.4}),
    Row("qwen2-vl-72b", "8xa100-40g", tp=8, units=PATCHES,
        settings={"cache_max_entry_count": 0.6}),
    Row("qwen2.5-vl-7b", "1xrtx3090", units=PATCHES, queued=(3,),
        settings={"cache_max_entry_count": 0.4}),
    Row("qwen2.5-vl-7b", "4xrtx3090", tp=4, units=PATCHES, queued=(3,)),
    # documents' readers
    Row("mineru2.5-1.2b", "1xt4", units=PAGES, queued=(8,), long_prompt=True, sampling=True,
        settings={"cache_max_entry_count": 0.5}),
    Row("mineru2.5-1.2b", "1xrtx3060", units=PAGES, queued=(8, 16),
        settings={"cache_max_entry_count": 0.5}),
    Row("mineru2.5-1.2b", "1xrtx4090", units=PAGES, queued=(16,), sampling=True, quick=True),
    Row("mineru2.5-1.2b", "2xrtx3090", tp=2, units=PAGES, queued=(8,), long_prompt=True),
    Row("mineru2.5-1.2b", "1xv100-32g", units=PAGES, queued=(8,)),
    Row("qwen2.5-vl-3b", "1xl4", units=PAGES, queued=(4,), long_prompt=True,
        settings={"session_len": 10240, "cache_max_entry_count": 0.6}),
    Row("qwen2.5-vl-3b", "1xt4", units=PAGES, settings={"session_len": 10240,
        "cache_max_entry_count": 0.5}),
    Row("olmocr-2-7b", "1xl40s", units=PAGES, queued=(8,), long_prompt=True, sampling=True,
        settings={"session_len": 16384, "cache_max_entry_count": 0.6}),
    Row("olmocr-2-7b", "2xrtx3090", tp=2, units=PAGES, queued=(8,),
        settings={"session_len": 16384, "cache_max_entry_count": 0.6}),
    # experts
    Row("mixtral-8x7b", "4xa100-40g", tp=4, long_prompt=True, sampling=True, quick=True),
    Row("mixtral-8x7b", "2xa100-80g", tp=2, long_prompt=True),
    Row("mixtral-8x7b", "8xv100-32g", tp=8, sampling=True),
    Row("mixtral-8x7b", "2xh100", tp=2, long_prompt=True),
    Row("qwen3-30b-a3b", "1xa100-80g", long_prompt=True, sampling=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3-30b-a3b", "4xrtx3090", tp=4, long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3-30b-a3b", "1xh100", settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("internvl3.5-30b-a3b", "2xa100-40g", tp=2, units=(13, 40), queued=(4,),
        settings={"cache_max_entry_count": 0.6}),
    Row("internvl3.5-30b-a3b", "4xl4", tp=4, units=(13, 40), queued=(4,),
        settings={"max_batch_size": 64, "cache_max_entry_count": 0.5}),
    # attention to latents, and experts
    Row("glm-4.7-flash", "1xa100-80g", long_prompt=True, sampling=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("glm-4.7-flash", "2xa100-40g", tp=2, long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("glm-4.7-flash", "4xrtx3090", tp=4,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("glm-4.7-flash", "1xh100", settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    # gpt-oss: experts in mxfp4, attention sinks and sliding windows
    Row("gpt-oss-20b", "1xrtx3090", long_prompt=True, sampling=True, quick=True,
        settings={"session_len": 32768}),
    Row("gpt-oss-20b", "1xa10", long_prompt=True, settings={"quant_policy": 8}),
    Row("gpt-oss-20b", "2xrtx3060", tp=2, long_prompt=True),
    Row("gpt-oss-20b", "4xl4", tp=4, long_prompt=True, sampling=True),
    Row("gpt-oss-20b", "1xh100", long_prompt=True),
    Row("gpt-oss-20b", "4xh100", tp=4, sampling=True, settings={"max_batch_size": 256}),
    Row("gpt-oss-20b-bf16", "1xa100-80g", long_prompt=True, sampling=True),
    Row("gpt-oss-20b-bf16", "4xrtx3090", tp=4, long_prompt=True),
    Row("internvl3.5-gpt-oss-20b-a4b", "1xa100-80g", units=(1, 13, 40), queued=(4,)),
    # gated delta nets
    Row("qwen3.5-4b", "1xrtx3090", units=SQUARES, queued=(4,), long_prompt=True, sampling=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.5}, quick=True),
    Row("qwen3.5-4b", "2xrtx3090", tp=2, units=SQUARES, queued=(4,), long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3.5-4b", "4xl4", tp=4, units=SQUARES, queued=(4,),
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3.5-4b", "1xv100-32g", units=SQUARES, long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    Row("qwen3.5-4b", "1xh100", units=SQUARES, queued=(4,), long_prompt=True, sampling=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3.5-4b", "1xrtx5090", units=SQUARES, queued=(4,), long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    Row("qwen3.5-9b", "1xa100-40g", units=SQUARES, queued=(4,), long_prompt=True, sampling=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    Row("qwen3.5-9b", "2xrtx4090", tp=2, units=SQUARES, queued=(4,),
        settings={"session_len": 16384, "max_batch_size": 32, "cache_max_entry_count": 0.6}),
    Row("qwen3.5-9b", "8xa100-40g", tp=8, units=SQUARES,
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    Row("qwen3.5-27b", "2xa100-80g", tp=2, units=SQUARES, queued=(4,), long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3.5-27b", "1xh100", units=SQUARES, long_prompt=True,
        settings={"session_len": 32768, "max_batch_size": 64, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-4b", "1xv100-16g", settings={"session_len": 8192, "max_batch_size": 128}),
    Row("qwen3.5-35b-a3b", "1xh200", units=SQUARES, long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.7}),
    Row("qwen3.5-4b", "1xrtx3090", packing="awq", units=SQUARES, long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-4b", "1xh100", packing="awq", units=SQUARES[:1], long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-4b", "1xv100-32g", packing="awq", units=SQUARES[:1], long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-4b", "1xl40s", packing="fp8", units=SQUARES, long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-4b", "1xh100", packing="fp8", units=SQUARES[:2], queued=(4,), long_prompt=True,
        sampling=True, settings={"session_len": 32768, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-4b", "1xa100-40g", packing="fp8", units=SQUARES[:1], long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.5}),
    Row("qwen3.5-9b", "2xrtx3090", tp=2, packing="awq", units=SQUARES, queued=(4,),
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    Row("qwen3.5-27b", "4xrtx4090", tp=4, packing="fp8", units=SQUARES[:2], long_prompt=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    # text only
    Row("llama-3.1-8b", "1xrtx3090", long_prompt=True, sampling=True,
        settings={"session_len": 32768, "cache_max_entry_count": 0.6}),
    Row("qwen2.5-7b", "2xrtx3090", tp=2, long_prompt=True),
    Row("qwen3-8b", "1xrtx3090", long_prompt=True, settings={"cache_max_entry_count": 0.6}),
    # deaths and hangs
    Row("internvl2-8b", "1xrtx3090:free=15GiB"),
    Row("internvl2-8b", "1xrtx3090", settings={"cache_max_entry_count": 0.1}),
    Row("internvl2-8b", "1xrtx3090", settings={"cache_max_entry_count": 0.95}),
    Row("internvl2-8b", "1xrtx3090", units=(13,), settings={"cache_max_entry_count": 0.9}),
    Row("internvl2-26b-awq", "1xrtx3090"),
    Row("internvl2-40b-awq", "1xrtx3090"),
    Row("qwen2-vl-7b", "1xrtx3090", units=((100, 100), (256, 256)), quick=True),
    Row("qwen2-vl-72b", "4xrtx3090", tp=4),
    Row("internvl2-8b", "1xt4"),
)  # fmt: skip
