"""Makes LMDeploy on pretend GPUs answer with a sentence that says that this is no answer.

Without this sentence every token would be 0, which a reader cannot tell from a fault. The engine
generates as usual; only the tokens that it returns are replaced.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle, islice
from typing import Any, Final

SENTENCE: Final = "This is no answer: pretend GPUs compute nothing."


def say_no_answer(module: Any) -> None:
    """Make LMDeploy's server return `SENTENCE` as every answer.

    ``module`` is `lmdeploy.serve.core.async_engine`. An answer without a limit of its length ends
    after the sentence; an answer with such a limit keeps its number of tokens and repeats the
    sentence.
    """
    engine: Any = module.AsyncEngine
    run = engine.safe_run

    @asynccontextmanager
    async def safe_run(self: Any, handle: Any, session: Any, **given: Any) -> AsyncIterator[Any]:
        config, prompt = given["gen_config"], len(given["input_ids"])
        words = self.tokenizer.encode(f"{SENTENCE} ", add_bos=False)
        unlimited = prompt + config.max_new_tokens >= self.session_len and not config.ignore_eos
        stop = [*(config.stop_token_ids or ())][:1]
        ends = unlimited and bool(stop) and config.max_new_tokens > len(words)
        async with run(self, handle, session, **given) as outputs:
            yield _said(outputs, [*words, *stop] if ends else words, ends=ends)

    engine.safe_run = safe_run


async def _said(outputs: AsyncIterator[Any], words: list[int], *, ends: bool) -> AsyncIterator[Any]:
    """Yield the engine's outputs with the tokens ``words``; ``ends``: end after the last token."""
    left = iter(words) if ends else cycle(words)
    total = 0
    async for output in outputs:
        total += len(output.token_ids)
        output.token_ids = [*islice(left, len(output.token_ids))]
        if output.logprobs:
            output.logprobs = [{token: 0.0} for token in output.token_ids]
        done = ends and total >= len(words)
        if done:
            output.status = type(output.status).FINISH
        yield output
        if done:
            return
