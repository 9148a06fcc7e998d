"""Reads a shell line that starts a server: the program, its arguments and the rest.

People paste the line as one quoted text, or type it word by word. `shlex` would lose the
backslashes of a Windows path, and the places where redirections begin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

#: LMDeploy's server; turbofit reads lines that start it.
SERVER: Final = "lmdeploy serve api_server"
#: Each row: a word to look for, the pattern of the program's name, the program's owner. The first
#: match counts; a pattern is compiled only if the line has the word.
_PROGRAMS: Final = (
    (
        "api_server",
        r"(?:lmdeploy[. ]serve[. ])?openai\.api_server|lmdeploy serve api_server",
        SERVER,
    ),
    ("lmdeploy", r"lmdeploy (?:lite|chat|convert|list|check_env|serve \w+)", ""),
    ("vllm", r"vllm serve|vllm\.entrypoints\.\S+|vllm-openai(?::\S+)?", "vLLM"),
    ("sglang", r"sglang serve|sglang\.launch_server", "SGLang"),
    ("ollama", r"ollama (?:run|serve|pull|create)", "Ollama"),
    ("swift", r"swift (?:deploy|infer|app|web-ui)|swift\.cli\.\S+", "ms-swift"),
    ("xinference", r"xinference launch|xinference-local", "Xinference"),
    ("llama-", r"llama-(?:server|cli|mtmd-cli)", "llama.cpp"),
    ("trtllm", r"trtllm-serve", "TensorRT-LLM"),
    ("text-generation", r"text-generation-launcher", "TGI"),
)
#: The most words of a program's name: python -m lmdeploy serve api_server.
_MOST_WORDS: Final = 5
_FOLDER: Final = r"^(?:[A-Za-z]:.*|\S*)[/\\]|\.exe$"
_NO_NAME: Final = "\0"
_WORD: Final = r"(?:'[^']*'|\"(?:\\.|[^\"\\])*\"|\\.|[^\s'\"\\<>|&;])+"
_TOKEN: Final = (
    rf"(?s)(?P<redirection>(?:\b\d|&)?[<>]{{1,3}}(?:&[\d-]|\s*{_WORD}))|(?P<operator>[|&;]+|\n(?!\s*-))"
    rf"|(?P<word>{_WORD})"
)
#: Quoted and escaped text, without quotes and backslashes; a Windows path keeps its backslashes.
_QUOTED: Final = r"(?s)'([^']*)'|\"((?:\\.|[^\"\\])*)\"|\\([\s'\"$&|;<>()])"
_ESCAPED: Final = r"\\([\"$`])"
#: The end of a line that continues in the next one, as in bash, cmd and PowerShell.
_CONTINUED: Final = r"[\\^`][ \t]*\r?\n"
#: Characters around a whole line: brackets of a subshell, and quotes of pages and chats.
_AROUND: Final = (
    r"(?s)(?:\((?P<inner>.*)\)"
    r"|[`\u2018\u201c\u201e\u300c](?P<quoted>.*)[`\u2019\u201c\u201d\u300d])"
)
_VARIABLE: Final = r"(?s)(?:\$env:|--env=)?([A-Za-z_]\w*)=(.*)"
#: Words that only set the variables after them.
_SETS: Final = frozenset({"export", "set", "env"})
#: Programs that start the program named after them.
_STARTERS: Final = frozenset({"nohup", "sudo", "time", "exec", "nice", "setsid", "uv"})
_CONTAINERS: Final = frozenset({"docker", "podman", "nerdctl", "kubectl"})
_OF_DOCKER: Final = frozenset({"run", "exec"})
#: Variables that are set as a shell would set them: turbofit, LMDeploy and its libraries read them.
_TAKEN: Final = (
    r"(?:CUDA|HF|LMDEPLOY|MODELSCOPE|NCCL|OMP|PYTORCH|RAY|TM|TRANSFORMERS|TRITON|TURBOFIT)_"
)
_ITS_GPUS: Final = r"CUDA_VISIBLE_DEVICES$"


class ShellLine(msgspec.Struct):
    """A shell line; ``words`` are the arguments after the program.

    ``of``: the program; ``left_out``: the rest of the line before and after it, without arguments.
    """

    of: str
    words: list[str]
    variables: dict[str, str]
    left_out: list[str]


class _Token(NamedTuple):
    """A part of a line: as it was typed, and as the shell passes it to a program."""

    typed: str
    word: str
    kind: str | None = "word"


def read_line(words: Sequence[str]) -> ShellLine | None:
    """Read the shell line in a command's words; None if no program is named.

    Words around a quoted line belong to the command. A line without quotes must begin with the
    first word: a variable, the program, or a program that starts it.
    """
    if not any(part in word for word in words for part, *_ in _PROGRAMS):
        return None
    before = list(words[: words.index("--")] if "--" in words else words)
    for at, text in enumerate(before):
        quoted = _line(_tokens(text)) if len(text.split()) > 1 else None
        if quoted is not None:
            quoted.words = [*words[:at], *quoted.words, *words[at + 1 :]]
            return quoted
    if before[:1] and before[0].startswith("-"):
        return None
    typed = _typed_line([_Token(it, it) for it in before])
    if typed is not None:
        typed.words += words[len(before) :]
    return typed


def _tokens(text: str) -> list[_Token]:
    """Split a text into words, redirections and operators, as a shell does.

    Each line of the text is a command; it continues if the next line begins with an option.
    """
    text = text.strip()
    if around := re.fullmatch(_AROUND, text):
        text = (around["inner"] or around["quoted"] or "").strip()
    found = re.finditer(_TOKEN, re.sub(_CONTINUED, " ", text))
    return [
        _Token(it[0].replace("\n", ";"), re.sub(_QUOTED, _unquoted, it[0]), it.lastgroup)
        for it in found
    ]


def _unquoted(quoted: re.Match[str]) -> str:
    single, double, escaped = quoted.groups()
    return single or re.sub(_ESCAPED, r"\1", double or "") or escaped or ""


def _line(tokens: list[_Token]) -> ShellLine | None:
    """Split a line at its program; a quoted line, as in `bash -c "…"`, is opened first."""
    program = _program(tokens)
    if program is None:
        flat = [part for it in tokens for part in (_tokens(it.word) if " " in it.word else [it])]
        return _line(flat) if len(flat) > len(tokens) else None
    return _sorted(tokens, *program)


def _typed_line(tokens: list[_Token]) -> ShellLine | None:
    """A line without quotes whose program comes first, or is started by the first word.

    In other places, a model, a folder or a value may have the name of a program.
    """
    words = [it.word for it in tokens]
    sets = (word in _SETS or re.fullmatch(_VARIABLE, word) for word in words)
    first = next((at for at, is_set in enumerate(sets) if not is_set), 0)
    program = _program(tokens)
    if program is None:
        return None
    begin, end, _ = program
    started = words[first] in _STARTERS | _CONTAINERS
    is_folder = end == begin + 1 and _name(words[begin]) != words[begin]
    return _sorted(tokens, *program) if started or (begin == first and not is_folder) else None


def _sorted(tokens: list[_Token], begin: int, end: int, of: str) -> ShellLine:
    """Sort the parts of a line that stand before, after and around the program's name."""
    before, behind = tokens[:begin], tokens[end:]
    ends = (at for at, it in enumerate(behind) if it.kind == "operator" or it.typed[:1] == "#")
    stop = next(ends, len(behind))
    call, after = behind[:stop], behind[stop:]
    redirections = [it for it in call if it.kind == "redirection"]
    words = [it.word for it in call if it.kind == "word"]
    variables, others = _variables(before)
    left_out = [_programs(others).strip("|&; "), _programs([*redirections, *after])]
    return ShellLine(of, words, variables, list(filter(None, left_out)))


def _variables(before: list[_Token]) -> tuple[dict[str, str], list[_Token]]:
    """The variables that the program will see, and the other tokens.

    They are set in its own command or by ``export``; of a container's variables only its GPUs
    count.
    """
    variables, others, exported = dict[str, str](), list[_Token](), False
    last = max((at for at, it in enumerate(before) if it.kind == "operator"), default=-1)
    taken = _ITS_GPUS if any(it.word in _CONTAINERS for it in before) else _TAKEN
    for at, token in enumerate(before):
        if token.word in _SETS:
            exported = True
            continue
        exported = exported and token.kind != "operator"
        match = re.fullmatch(_VARIABLE, token.word)
        reaches_it = at > last or exported or token.word.startswith("$env:")
        if match and reaches_it and re.match(taken, match[1]) and "$" not in match[2]:
            variables[match[1]] = match[2]
        else:
            others.append(token)
    return variables, others


def _programs(tokens: list[_Token]) -> str:
    """The names of commands, with three dots for arguments, which may contain secrets."""
    shown, is_name = list[str](), True
    for token in tokens:
        if token.kind == "operator":
            is_name = True
            shown += [token.typed] if shown[-1:] != [token.typed] else []
        elif token.kind == "redirection" and "<" not in token.typed:
            shown.append(token.typed)
        elif is_name and (variable := re.fullmatch(_VARIABLE, token.word)):
            shown.append(f"{variable[1]}=...")
        elif is_name and token.kind == "word":
            shown.append(token.word.partition(" ")[0])
            is_name = token.word in _STARTERS
        elif shown[-1:] == ["docker"] and token.word in _OF_DOCKER:
            shown.append(token.word)
        elif shown[-1:] != ["..."]:
            shown.append("...")
    return " ".join(shown)


def _name(word: str) -> str:
    """A program's name without its folder; a text of several words is not a name."""
    name = re.sub(_FOLDER, "", word)
    return _NO_NAME if " " in name else name


def _program(tokens: list[_Token]) -> tuple[int, int, str] | None:
    """The begin and end of the program's name among the tokens, and the program."""
    names = [_name(it.word) for it in tokens]
    if names[:1] == ["api_server"]:
        return 0, 1, SERVER
    heads = [" ".join(names[at : at + _MOST_WORDS]) + " " for at in range(len(names))]
    for part, words, of in _PROGRAMS:
        for at, head in enumerate(heads):
            if part in head and (match := re.match(rf"(?:python[\d.]* -m )?(?:{words}) ", head)):
                return at, at + match[0].count(" "), of or match[0].strip()
    return None
