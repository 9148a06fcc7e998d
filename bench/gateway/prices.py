"""Measures what parameters of a request cost LMDeploy's event loop, which serves all clients.

    python -m bench.gateway.prices [WORD …]      # once for each release of LMDeploy

Runs the installed LMDeploy, XGrammar and Transformers, each case in a process of its own that is
ended after two minutes, and prints seconds of one core, the least of three runs. The limits of
`turbofit.gateway.limits` follow from these figures. For a grammar, the table says whether the
gateway passes it on: it gives a grammar `grammar_trials.SECONDS` of processor time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from turbofit.gateway.grammar_trials import SECONDS as TRIAL

SECONDS, TOKENS = 120, 151_643
#: As Qwen's: each tool in a line of its own.
TEMPLATE = "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ messages[0]['content'] }}"


def write_tokenizer(folder: str) -> None:
    """Write a byte-level tokenizer with `TOKENS` random tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chance, names = random.Random(1), dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(names) < TOKENS:
        names["".join(chance.choices("etaoinshrdlucmfwypvbgkqjxz", k=chance.randint(2, 9)))] = None
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE).save_pretrained(folder)
    Path(folder, "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')


def grammar(given: Any, folder: str) -> Callable[[], Any]:
    import xgrammar
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(f"{folder}/tokenizer.json").get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[0])
    if isinstance(given, str):
        return lambda: xgrammar.GrammarCompiler(info).compile_regex(given)
    return lambda: xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(given))


def stops(count: int, folder: str) -> Callable[[], Any]:
    from lmdeploy.tokenizer import HuggingFaceTokenizer

    logging.disable(logging.WARNING)  # one for each string
    made, numbers = HuggingFaceTokenizer(folder), itertools.count()  # LMDeploy keeps the newest
    made.indexes_containing_token("warm")
    return lambda: [made.indexes_containing_token(f"stop{next(numbers)}") for _ in range(count)]


def biases(count: int, applied: bool, _: str) -> Callable[[], Any]:
    import torch
    from lmdeploy.serve.openai.chat_completions import logits_processors

    vocabulary: Any = type("Vocabulary", (), {"vocab_size": TOKENS})()
    given, logits = {str(number): 1.0 for number in range(count)}, torch.zeros(TOKENS)
    make = partial(logits_processors.logit_bias_logits_processor, given, vocabulary)
    return (lambda: make()([], logits)) if applied else make


def tools(count: int, size: int, folder: str) -> Callable[[], Any]:
    from transformers import AutoTokenizer

    made, said = AutoTokenizer.from_pretrained(folder), [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f", "description": "words " * (size // 6)}}
    written = partial(made.apply_chat_template, said, tools=[tool] * count, tokenize=False)
    return lambda: made.encode(written())


def strings(count: int, kind: str = "string", *, required: bool = False) -> Any:
    """Return the schema of an object of ``count`` properties."""
    names = {f"prop_{number}": {"type": kind} for number in range(count)}
    needed = list(names) if required else []
    return {
        "type": "object",
        "properties": names,
        "required": needed,
        "additionalProperties": False,
    }


GRAMMARS: dict[str, Any] = {
    **{f"{n} required strings": strings(n, required=True) for n in (10, 50, 200, 1000)},
    **{f"{n} optional strings": strings(n) for n in (20, 40, 60, 80, 100)},
    "80 optional integers": strings(80, "integer"),
    "enum of 5,000": {"enum": [f"value number {n}" for n in range(5000)]},
    **{f"{key} {n}": {"type": "string", key: n}
       for key in ("minLength", "maxLength") for n in (10, 50, 100, 1000)},
    "maxItems 1,000": {"type": "array", "items": {"type": "string"}, "maxItems": 1000},
    "200 alternatives": {"anyOf": [strings(3, required=True)] * 200},
    **{one: one for one in ("[a-z]{1,100}", "[a-z]{1,1000}", ".{1,100}", "(a{1,100}){1,100}")},
    **{f"{one} {n} times": one * n for one in ("(a?)", "[a-z]*") for n in (20, 40, 80)},
}  # fmt: skip
CASES: dict[str, Callable[[str], Callable[[], Any]]] = {
    **{f"a grammar: `{name}`": partial(grammar, given) for name, given in GRAMMARS.items()},
    **{f"{n:,} stop strings": partial(stops, n) for n in (1, 16, 1000, 10_000)},
    **{f"a `logit_bias` of {n:,} tokens": partial(biases, n, False) for n in (1024, 100_000)},
    **{f"a token under {n:,} biases": partial(biases, n, True) for n in (1024, 100_000)},
    **{f"{n} tools of {size:,} bytes": partial(tools, n, size)
       for n, size in ((1, 500), (128, 500), (128, 8192), (128, 65_536))},
}  # fmt: skip


def measure(name: str, answer: Any) -> None:
    """Put the seconds of one core into ``answer``: the least of three runs."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder)
        run, times = CASES[name](folder), []
        while len(times) < 3 and sum(times) < SECONDS / 4:
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
        answer.put(min(times))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.prices", description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose names have one of them")
    words = parser.parse_args().words or [""]
    if find_spec("xgrammar") is None:
        raise SystemExit("XGrammar is not installed: pip install xgrammar")
    print("| a request with | seconds of the event loop | the gateway |\n|---|---|---|")
    for name in (name for name in CASES if any(word in name for word in words)):
        answer: Any = multiprocessing.Queue()
        child = multiprocessing.Process(target=measure, args=(name, answer))
        child.start()
        child.join(SECONDS)
        said = "not within two minutes" if child.is_alive() else "failed"
        child.kill()
        child.join()
        took = SECONDS if answer.empty() else answer.get()
        judged = "passes" if took <= TRIAL else "refused"
        if not name.startswith("a grammar"):
            judged = ""
        print(f"| {name} | {said if took == SECONDS else f'{took:.4f}'} | {judged} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
