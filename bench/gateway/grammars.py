"""What XGrammar takes to compile grammars.

    python -m bench.gateway.grammars TOKENIZER.json

Prints seconds of one core for each, as LMDeploy would spend on its event loop: the prices of
`turbofit.gateway.limits.grammars`. Each in a process of its own, ended after a minute. Needs
xgrammar and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from typing import Any

SECONDS = 60


def strings(count: int, *, required: bool = True, kind: str = "string", **more: Any) -> Any:
    """An object of so many properties."""
    names = [f"prop_{number}" for number in range(count)]
    properties = {name: {"type": kind, **more} for name in names}
    made: dict[str, Any] = {"type": "object", "properties": properties}
    return {**made, "required": names if required else [], "additionalProperties": False}


def nested(levels: int) -> Any:
    """Objects inside each other."""
    made: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        made = {"type": "object", "properties": {"a": made}, "required": ["a"]}
    return made


CASES: dict[str, Any] = {
    **{f"{n} required strings": strings(n) for n in (10, 50, 200, 1000)},
    **{f"{n} optional strings": strings(n, required=False) for n in (20, 40, 60, 80, 100)},
    "80 optional integers": strings(80, required=False, kind="integer"),
    "enum of 5,000": {"enum": [f"value number {n}" for n in range(5000)]},
    **{f"{n} deep": nested(n) for n in (20, 64, 100)},
    **{f"minLength {n}": {"type": "string", "minLength": n} for n in (10, 50, 100, 1000)},
    **{f"maxLength {n}": {"type": "string", "maxLength": n} for n in (10, 50, 100, 1000)},
    "maxItems 1,000": {"type": "array", "items": {"type": "string"}, "maxItems": 1000},
    "200 alternatives": {"anyOf": [strings(3)] * 200},
    **{f"[a-z]{{1,{n}}}": f"[a-z]{{1,{n}}}" for n in (100, 1000)},
    ".{1,100}": ".{1,100}",
    "(a{1,100}){1,100}": "(a{1,100}){1,100}",
    **{f"(a?) {n} times": "(a?)" * n for n in (20, 40, 80)},
    **{f"[a-z]* {n} times": "[a-z]*" * n for n in (20, 40)},
    "1,024 letters": "abcdefgh" * 128,
}


def compile_one(path: str, grammar: Any, answer: Any) -> None:
    """Put the seconds of one core into ``answer``."""
    import xgrammar
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(path).get_vocab()
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    info = xgrammar.TokenizerInfo(
        tokens, vocab_type=xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[0]
    )
    compiler = xgrammar.GrammarCompiler(info)
    compiler.compile_json_schema('{"type": "integer"}')
    begun = time.process_time()
    if isinstance(grammar, str):
        compiler.compile_regex(grammar)
    else:
        compiler.compile_json_schema(json.dumps(grammar))
    answer.put(time.process_time() - begun)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.grammars", description=__doc__)
    parser.add_argument("tokenizer", help="a tokenizer.json")
    args = parser.parse_args()
    print("| grammar | seconds of one core |\n|---|---|")
    for name, grammar in CASES.items():
        answer: Any = multiprocessing.Queue()
        child = multiprocessing.Process(target=compile_one, args=(args.tokenizer, grammar, answer))
        child.start()
        child.join(SECONDS)
        late = child.is_alive()
        child.kill()
        child.join()
        said = f"not within {SECONDS} s" if late else f"{answer.get():.3f}"
        print(f"| `{name}` | {said} |", flush=True)


if __name__ == "__main__":
    main()
