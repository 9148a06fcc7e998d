"""Reads pasted lines that start LMDeploy in other ways than its server: Python code, and ms-swift.

Each becomes the words that follow ``lmdeploy serve api_server``: the model, and LMDeploy's options.
"""

from __future__ import annotations

import ast
import re
import shlex
from typing import Final, NamedTuple

from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import plain

#: The engine of each of LMDeploy's configurations in Python.
_CONFIGS: Final = {"TurbomindEngineConfig": "turbomind", "PytorchEngineConfig": "pytorch"}
_CODE: Final = re.compile(r"\b(?:pipeline|TurbomindEngineConfig|PytorchEngineConfig)\s*\(")
_SWIFT: Final = re.compile(r"\bswift (?:deploy|infer|app|app-ui|web-ui|eval)\b")
#: Options of ms-swift that name the model, the surest first.
_SWIFT_MODEL: Final = ("--model", "--model_id_or_path", "--ckpt_dir", "--model_type")
#: Options of ms-swift that are LMDeploy's, without the prefix that newer releases write.
_SWIFT_OPTION: Final = re.compile(
    r"--(?:lmdeploy_)?(tp|session_len|cache_max_entry_count|quant_policy|max_batch_size)"
)
READ: Final = (
    "read are `lmdeploy serve api_server …`, `lmdeploy serve gradio …`, `lmdeploy chat …`, Python's"
    " pipeline('MODEL', backend_config=TurbomindEngineConfig(…)), ms-swift's with"
    " --infer_backend lmdeploy, `vllm serve …` and `sglang serve …`"
)


class PastedLine(NamedTuple):
    """The words of a line for LMDeploy's server; ``left_out`` names what else the line has."""

    words: list[str]
    left_out: list[str]


def pasted_line(text: str) -> PastedLine | None:
    """Return what a pasted line asks of LMDeploy; None for a word of another kind.

    Raises:
        UsageError: the line cannot be read, or starts another engine.
    """
    if _CODE.search(text):
        return _of_code(text)
    if found := _SWIFT.search(text):
        return _of_swift(shlex.split(text[found.end() :]))
    return None


def _of_code(text: str) -> PastedLine:
    """Read the calls of ``pipeline`` and of LMDeploy's configurations in a piece of Python."""
    try:
        tree = ast.parse(text.strip())
    except SyntaxError as exc:
        raise UsageError(
            f"the pasted Python cannot be read: {exc.msg}", hint="paste whole statements"
        ) from None
    line = PastedLine([], [])
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        if name == "pipeline":
            _take_pipeline(call, line)
        elif name in _CONFIGS:
            line.words.extend(["--backend", _CONFIGS[name]])
            _take_fields(call, line)
    return line


def _take_pipeline(call: ast.Call, line: PastedLine) -> None:
    paths = [*call.args[:1], *(one.value for one in call.keywords if one.arg == "model_path")]
    model = _constant(paths[0]) if paths else None
    if not isinstance(model, str):
        raise UsageError(
            "the pasted pipeline(…) does not name its model", hint="write the model as a text there"
        )
    line.words.insert(0, model)


def _take_fields(call: ast.Call, line: PastedLine) -> None:
    """Take each field of a configuration as LMDeploy's option of the same name."""
    for keyword in call.keywords:
        value, name = _constant(keyword.value), option_of(keyword.arg or "")
        if value is None:
            line.left_out.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
        elif value is not False:
            line.words.extend([name] if value is True else [name, str(value)])


def _constant(node: ast.expr) -> object:
    """Return the value of a text, a number or a truth value; None for other code."""
    return node.value if isinstance(node, ast.Constant) else None


def _of_swift(words: list[str]) -> PastedLine:
    """Read an ms-swift line; options that LMDeploy does not have are left out."""
    line, given = PastedLine([], []), dict[str, str]()
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, attached = word.partition("=")
            given[name] = attached if equals else value
    backend = given.pop("--infer_backend", "pt")
    if backend != "lmdeploy":
        raise UsageError(
            f"the pasted line starts ms-swift's engine {plain(backend)}, and no LMDeploy",
            hint=f"--infer_backend lmdeploy is the one that turbofit plans; {READ}",
        )
    line.words.extend([given[name] for name in _SWIFT_MODEL if name in given][:1])
    for name, value in given.items():
        if option := _SWIFT_OPTION.fullmatch(name):
            line.words.extend([option_of(option[1]), value])
        elif name not in _SWIFT_MODEL:
            line.left_out.append(name)
    return line
