"""What a forecast of speed rests on, apart: ``python -m bench.gpu.speed MODEL FOLDER``.

One start of TurboMind in this process, weights that read as zeros (a card may clock higher than
with real ones: a little fast). Each figure is the least of three tries, in seconds, at a mark:

- ``ceilings``: bytes/s of a copy and FLOP/s of a product by torch, which the card reaches at most;
- ``prefill_N``: a prompt of about N tokens, for one token (``prompt``: how many they were);
- ``first_B``, ``decode_B``: B short prompts at once, for one token and for ``tokens`` each; a step
  is their difference over the tokens between them;
- ``images_B``: B images of a fixed size at once, for one token; beside the prefill of as many
  tokens (``prefill_N``) the rest is the tower and the host's preparation of the images.

The first try of each warms up and does not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.constants import mark

__all__ = ["BATCHES", "IMAGE", "LENGTHS", "PREFILL", "measure"]

LENGTHS, BATCHES, IMAGES = (512, 2048, 8192, 30000), (1, 4, 16, 64), (1, 8)
TOKENS, TRIES = 128, 3
#: Width and height; 12 tiles and a thumbnail, or 12,288 patches.
IMAGE = (1792, 1344)
PREFILL, SESSION = 8192, 32768


def ceilings() -> dict[str, float]:
    """A copy's bytes both ways, and a half-precision product."""
    import torch

    def seconds(act: Callable[[], Any]) -> float:
        act()
        torch.cuda.synchronize()
        begun = time.monotonic()
        for _ in range(10):
            act()
        torch.cuda.synchronize()
        return max(time.monotonic() - begun, 1e-6) / 10

    source, side = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda"), 8192
    target = torch.empty_like(source)
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    return {
        "copy": 2 * source.numel() / seconds(lambda: target.copy_(source)),
        "product": 2 * side**3 / seconds(lambda: a @ b),
    }


def measure(ask: Callable[[list[Any], int, bool], Any], picture: Any, say: Any = mark) -> None:
    """All steps; one that fails says so, and the next is tried.

    Args:
        ask: prompts, tokens for each, and whether they are chats; gives the answers.
        picture: what is asked about.
        say: takes a mark.
    """

    def step(name: str, what: list[Any], tokens: int, chat: bool = False) -> None:
        took: list[float] = []
        try:
            for _ in range(TRIES + 1):
                begun = time.monotonic()
                said = ask(what, tokens, chat)
                took.append(time.monotonic() - begun)
                # A request that no cache can hold is answered at once, with an error.
                bad = [one for one in said if one.generate_token_len < tokens]
                if bad:
                    raise RuntimeError(f"not answered whole: {bad[0].finish_reason}")
        except Exception as exc:  # noqa: BLE001 - whatever it is, the others count
            say(name, failed=f"{type(exc).__name__}: {exc}"[:300])
            return
        say(
            name, seconds=min(took[1:]), tries=took, rows=len(what), tokens=tokens,
            prompt=said[0].input_token_len, answered=sum(one.generate_token_len for one in said),
        )  # fmt: skip

    for length in LENGTHS:
        step(f"prefill_{length}", ["a" * length], 1)
    for rows in BATCHES:
        text = ["What is this?"] * rows
        step(f"first_{rows}", text, 1)
        step(f"decode_{rows}", text, TOKENS)
    for count in IMAGES:
        step(f"images_{count}", [("What is this?", picture)] * count, 1, chat=True)


def main(words: list[str]) -> int:
    """Ceilings, then the engine."""
    from bench.gpu.shapes import checkpoint

    mark("begin")
    try:
        import torch

        mark("ceilings", **ceilings())
        torch.cuda.empty_cache()
    except (ImportError, RuntimeError) as exc:
        mark("ceilings", failed=str(exc)[:300])
    folder = checkpoint(words[0], Path(words[1]))

    from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
    from PIL import Image

    from turbofit.rehearse.turbomind.hfconfig import register_internvl

    register_internvl()
    begun = time.monotonic()
    config = TurbomindEngineConfig(
        cache_max_entry_count=0.5, session_len=SESSION, max_batch_size=max(BATCHES),
        max_prefill_token_num=PREFILL,
    )  # fmt: skip
    with pipeline(str(folder), backend_config=config) as pipe:
        mark("ready", seconds=time.monotonic() - begun, batch=max(BATCHES), prefill=PREFILL)

        def ask(what: list[Any], tokens: int, chat: bool) -> Any:
            config = GenerationConfig(max_new_tokens=tokens, top_k=1, ignore_eos=True)
            more = {} if chat else {"do_preprocess": False}
            return pipe(what, gen_config=config, use_tqdm=False, **more)

        measure(ask, Image.new("RGB", IMAGE))
        mark("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
