"""Decides whose fault an error of code is: by the files on its stack, for lines without a row.

An error of code is an exception that Python itself raises where code does not fit code. The
innermost frames outside torch and Python's own library name the package at fault:

- LMDeploy, if its own files called each other: a fault of that release;
- another package, or the checkpoint's code: the package, with the release that the log prints;
- a person's own files: nobody's fault that turbofit knows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.logs.answer import NOT_KNOWN
from turbofit.logs.causes import text_of
from turbofit.logs.log_events import PythonError

if TYPE_CHECKING:
    from turbofit.logs.case import LogCase
    from turbofit.logs.facts import LogEvent

#: Exceptions that Python raises for code that does not fit other code.
_OF_CODE: Final = re.compile(
    r"(?:Attribute|Type|Name|UnboundLocal|Index|ZeroDivision|Recursion)Error: "
    r"|ValueError: (?:not enough|too many) values to unpack"
)
#: Exceptions that a person's data raises, too; between LMDeploy's own files LMDeploy is at fault.
_OF_LMDEPLOY: Final = re.compile(r"(?:Key|NotImplemented)Error\b")
#: A check without words for people, and torch's words where tensors do not fit each other. Code
#: raises them by itself, too: then its line begins with ``raise``.
_FAILED: Final = re.compile(
    r"AssertionError:? *$|RuntimeError: (?!.*(?:CUDA error|[Nn]o such|\bopen|\bfile\b))"
    r".*\b(?:shapes?|sizes?|dim(?:ension)?s?|strides?|tensors?)\b"
)
#: Errors of a call or a name. If one package's files made them alone, no input is the reason.
_CERTAIN: Final = re.compile(
    r"(?:UnboundLocal|Name)Error: |TypeError: .*\(\) (?:missing \d+ required|takes .*positional"
    r"|got (?:an unexpected|multiple values|some positional))"
)
#: Packages whose frames only pass a call on: torch, and Python's own library.
_PASSES_ON: Final = re.compile(r"[/\\]torch[/\\]|[/\\]python\d[\d.]*[/\\](?!site-|dist-)|<frozen")
_CHECKPOINT: Final = "transformers_modules"
#: The package that a file belongs to. A file of a person's own has none. The innermost folder
#: counts, since an environment is often called lmdeploy, too.
_PACKAGE: Final = re.compile(
    rf".*[/\\](?:(?:site|dist)-packages[/\\]|(?=(?:{_CHECKPOINT}|lmdeploy)[/\\]))([A-Za-z_]\w*)"
)


class WhoseFault(NamedTuple):
    """An answer, with a kind as rows of `presets/causes.yaml` have.

    ``what`` is empty if the log proves no cause; ``possible`` then has what others had, and
    ``where`` says inside whose code it failed.
    """

    kind: str
    what: str = ""
    where: str = NOT_KNOWN
    possible: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def whose_fault(mark: LogEvent, case: LogCase) -> WhoseFault | None:
    """Return the answer to an error of code; None for another line, or for a person's own files."""
    frames = [frame for frame in mark.stack if not _PASSES_ON.search(frame.path)]
    owners = [owner_of(frame.path) for frame in frames]
    if not isinstance(mark.event, PythonError) or not owners or not owners[-1]:
        return None
    text, file = mark.text.strip(), re.split(r"[/\\]", frames[-1].path)[-1]
    if owners[-1] == "lmdeploy":
        near = len(owners) == 1 and _CERTAIN.match(text)
        called = near or owners[-2:] == ["lmdeploy", "lmdeploy"]
        return _of_lmdeploy(text, file, frames[-1].code, case) if called else None
    return _of_package(owners[-1], file, case) if _OF_CODE.match(text) else None


def owner_of(path: str) -> str:
    """Return the package that a file belongs to; empty for a file of a person's own."""
    return "".join(_PACKAGE.findall(path))


def _of_package(owner: str, file: str, case: LogCase) -> WhoseFault:
    """Return the answer to an error in another package's, or in the checkpoint's, own code."""
    if owner == _CHECKPOINT:
        whose, possible = "the checkpoint's own code", text_of("checkpoint at fault")
        step = text_of("fitting transformers")
    else:
        whose = f"{owner} {case.subject.packages.get(owner, '')}".strip()
        possible = text_of("package at fault").format(name=whose)
        step = text_of("fitting package").format(package=owner)
    where = text_of("failed in").format(whose=whose, file=file)
    return WhoseFault("package_versions", where=where, possible=(possible,), changes=(step,))


def _of_lmdeploy(text: str, file: str, code: str, case: LogCase) -> WhoseFault | None:
    """Return the answer to an error in LMDeploy's ``file``, whose line ``code`` its own code ran.

    None for an exception that LMDeploy raises with words for people.
    """
    failed = bool(code) and not code.startswith("raise ") and _FAILED.match(text)
    if not (failed or _OF_CODE.match(text) or _OF_LMDEPLOY.match(text)):
        return None
    version = case.subject.version
    whose = f"LMDeploy {version}" if version else "LMDeploy"
    fault = f"a fault of {whose}, in {file}, which its own code called"
    than = f"than {version} " if version else ""
    ascend = (text_of("newer dlinfer"),) if "ascend" in case.subject.facts else ()
    changes = (text_of("newer lmdeploy").format(than=than), *ascend)
    if _CERTAIN.match(text):
        return WhoseFault("program_bug", f"{fault}: {text}", changes=changes)
    where = text_of("failed in").format(whose=whose, file=file)
    return WhoseFault("program_bug", "", where, (fault, text_of("bad input")), changes)
