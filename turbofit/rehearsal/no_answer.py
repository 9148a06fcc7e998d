"""Makes LMDeploy on pretend GPUs answer with a sentence: pretend GPUs compute no answer.

On a pretend GPU the engine generates the token 0 again and again, and a reader could take such an
answer for a fault. The engine generates as usual; only the tokens of its outputs are replaced.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle, islice
from typing import Any, Final

SENTENCE: Final = "This is no answer: pretend GPUs compute nothing."


def say_no_answer(module: Any) -> None:
    """Make LMDeploy's server return `SENTENCE` as every answer.

    ``module`` is `lmdeploy.serve.core.async_engine`. If the request does not limit the length of
    its answer, the answer ends after the sentence. If the request limits the length, the answer has
    as many tokens as the limit allows, and repeats the sentence.
    """
    engine: Any = module.AsyncEngine
    run = engine.safe_run

    @asynccontextmanager
    async def safe_run(self: Any, handle: Any, session: Any, **keywords: Any) -> AsyncIterator[Any]:
        config, prompt = keywords["gen_config"], len(keywords["input_ids"])
        words = self.tokenizer.encode(f"{SENTENCE} ", add_bos=False)
        unlimited = prompt + config.max_new_tokens >= self.session_len and not config.ignore_eos
        stop = [*(config.stop_token_ids or ())][:1]
        ends = unlimited and bool(stop) and config.max_new_tokens > len(words)
        async with run(self, handle, session, **keywords) as outputs:
            yield _with_sentence(outputs, [*words, *stop] if ends else words, ends=ends)

    engine.safe_run = safe_run


async def _with_sentence(
    outputs: AsyncIterator[Any], words: list[int], *, ends: bool
) -> AsyncIterator[Any]:
    """Yield the engine's outputs with ``words`` as their tokens.

    With ``ends`` the outputs end after the last token; else the tokens repeat.
    """
    tokens = iter(words) if ends else cycle(words)
    total = 0
    async for output in outputs:
        total += len(output.token_ids)
        output.token_ids = [*islice(tokens, len(output.token_ids))]
        if output.logprobs:
            output.logprobs = [{token: 0.0} for token in output.token_ids]
        done = ends and total >= len(words)
        if done:
            output.status = type(output.status).FINISH
        yield output
        if done:
            return
