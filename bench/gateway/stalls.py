"""What parameters of a request cost LMDeploy's event loop, which answers everybody.

    python -m bench.gateway.stalls [WORD …]

Runs the code of the installed LMDeploy itself, each case in a process of its own that is ended
after two minutes: stop strings (`tokenizer.py`, indexes_containing_token), `logit_bias`
(`chat_completions/logits_processors.py`), tools in a chat template (Transformers'
apply_chat_template, and the tokens of what it wrote). The vocabulary has 151,643 made-up tokens.
What grammars cost is in `grammars.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 120
TOKENS = 151_643
#: A template as Qwen's: each tool in a line of its own.
TEMPLATE = (
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def tokenizer(folder: str) -> Any:
    """LMDeploy's, over a byte-level vocabulary of so many tokens."""
    import logging

    logging.disable(logging.WARNING)  # one for each string
    from lmdeploy.tokenizer import HuggingFaceTokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(1)
    names = dict.fromkeys(letters)
    while len(names) < TOKENS:
        names["".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(2, 9)))] = None
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE).save_pretrained(folder)
    Path(folder, "config.json").write_text(
        json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    return HuggingFaceTokenizer(folder)


def stops(count: int) -> Any:
    def prepare(folder: str) -> Any:
        made = tokenizer(folder)
        made.indexes_containing_token("warm")
        runs = iter(range(1000))

        def run() -> None:
            new = next(runs)  # LMDeploy keeps the newest ten
            for number in range(count):
                made.indexes_containing_token(f"stop{new}-{number}")

        return run

    return prepare


def biases(count: int, *, steps: int) -> Any:
    def prepare(_folder: str) -> Any:
        import torch
        from lmdeploy.serve.openai.chat_completions.logits_processors import (
            logit_bias_logits_processor,
        )

        class Vocabulary:
            vocab_size = TOKENS

        given = {str(number): 1.0 for number in range(count)}
        logits = torch.zeros(TOKENS)

        def run() -> None:
            processor = logit_bias_logits_processor(given, Vocabulary())  # type: ignore[arg-type]
            for _ in range(steps):
                processor([], logits)

        return run

    return prepare


def tools(count: int, size: int) -> Any:
    def prepare(folder: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer(folder)
        made = AutoTokenizer.from_pretrained(folder)
        one = {"type": "function", "function": {"name": "f", "description": "words " * (size // 6)}}
        messages = [{"role": "user", "content": "hi"}]

        def run() -> None:
            text = made.apply_chat_template(messages, tools=[one] * count, tokenize=False)
            made.encode(text)

        return run

    return prepare


CASES: dict[str, Any] = {
    "1 stop string": stops(1),
    "16 stop strings (the limit)": stops(16),
    "1,000 stop strings": stops(1000),
    "10,000 stop strings": stops(10_000),
    "a `logit_bias` of 1,024 tokens (the limit)": biases(1024, steps=0),
    "a `logit_bias` of 100,000 tokens": biases(100_000, steps=0),
    "each token of an answer under 1,024 biases": biases(1024, steps=1),
    "each token of an answer under 100,000 biases": biases(100_000, steps=1),
    "1 tool of 500 bytes": tools(1, 500),
    "128 tools of 500 bytes (the limit: 64 KiB)": tools(128, 500),
    "128 tools of 8 KiB: 1 MiB": tools(128, 8192),
    "128 tools of 64 KiB: 8 MiB": tools(128, 65_536),
}


def measure(name: str, answer: Any) -> None:
    """Put the seconds of one core into ``answer``: the least of three runs."""
    with tempfile.TemporaryDirectory() as folder:
        run = CASES[name](folder)
        times = []
        while len(times) < 3 and sum(times) < SECONDS / 4:
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
        answer.put(min(times))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.stalls", description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose names have one of them")
    words = parser.parse_args().words or [""]
    names = [name for name in CASES if any(word in name for word in words)]
    print("| a request with | seconds of the event loop |")
    print("|---|---|")
    for name in names:
        answer: Any = multiprocessing.Queue()
        child = multiprocessing.Process(target=measure, args=(name, answer))
        child.start()
        child.join(SECONDS)
        alive = child.is_alive()
        child.kill()
        child.join()
        took = "not within two minutes" if alive else "failed"
        if not answer.empty():
            took = f"{answer.get():.4f}"
        print(f"| {name} | {took} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
