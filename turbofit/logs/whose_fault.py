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
#: Exceptions of a failed operation or check. One that code raises by itself has words for people.
_FAILED: Final = re.compile(r"(?:Runtime|Assertion)Error\b")
_RAISED: Final = "raise "
#: Errors of a call or a name. If one package's files made them alone, no input is the reason.
_CERTAIN: Final = re.compile(
    r"(?:UnboundLocal|Name)Error: |TypeError: .*\(\) (?:missing \d+ required|takes .*positional"
    r"|got (?:an unexpected|multiple values|some positional))"
)
#: Packages whose frames only pass a call on: torch, and Python's own library.
_PASSES_ON: Final = re.compile(r"[/\\]torch[/\\]|[/\\]python\d[\d.]*[/\\](?!site-|dist-)|<frozen")
_CHECKPOINT: Final = "transformers_modules"
_PACKAGE: Final = re.compile(
    rf"[/\\]({_CHECKPOINT})[/\\]|(?:site|dist)-packages[/\\]([A-Za-z_]\w*)|[/\\](lmdeploy)[/\\]"
)


class WhoseFault(NamedTuple):
    """An answer, with a kind as rows of `presets/causes.yaml` have.

    ``what`` is empty if the log proves no cause; ``possible`` then has what others had, and
    ``where`` says in whose code it failed.
    """

    kind: str
    what: str = ""
    where: str = ""
    possible: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def whose_fault(mark: LogEvent, case: LogCase) -> WhoseFault | None:
    """Return the answer to an error of code; None for another line, or for a person's own files."""
    text, frames = mark.text.strip(), [f for f in mark.stack if not _PASSES_ON.search(f.path)]
    owners = [_package_of(frame.path) for frame in frames]
    if not isinstance(mark.event, PythonError) or not frames or not owners[-1]:
        return None
    owner, of_code = owners[-1], _OF_CODE.match(text) is not None
    file = re.split(r"[/\\]", frames[-1].path)[-1]
    if owner == "lmdeploy":
        own = of_code or _OF_LMDEPLOY.match(text) or _failed_by_itself(text, frames[-1].code)
        alone = len(owners) == 1 and _CERTAIN.match(text) is not None
        called = owners[-2:] == [owner, owner] or alone
        return _of_lmdeploy(text, file, case) if own and called else None
    if not of_code:
        return None
    if owner == _CHECKPOINT:
        whose, possible = "the checkpoint's own code", text_of("checkpoint at fault")
        step = text_of("fitting transformers")
    else:
        whose = f"{owner} {case.subject.packages.get(owner, '')}".strip()
        possible = text_of("package at fault").format(name=whose)
        step = text_of("fitting package").format(package=owner)
    where = text_of("failed in").format(whose=whose, file=file)
    return WhoseFault("package_versions", where=where, possible=(possible,), changes=(step,))


def _failed_by_itself(text: str, code: str) -> bool:
    """Return whether an operation or a check failed in this line of code, without its own words."""
    return bool(code) and not code.startswith(_RAISED) and _FAILED.match(text) is not None


def _of_lmdeploy(text: str, file: str, case: LogCase) -> WhoseFault:
    """Return the answer to an error between LMDeploy's files, of which ``file`` is innermost."""
    version = case.subject.version
    release = f"LMDeploy {version}" if version else "this release of LMDeploy"
    fault = f"a fault of {release}, in {file}, which its own code called"
    than = f"than {version} " if version else ""
    ascend = (text_of("newer dlinfer"),) if "ascend" in case.subject.facts else ()
    changes = (text_of("newer lmdeploy").format(than=than), *ascend)
    if _CERTAIN.match(text):
        return WhoseFault("program_bug", f"{fault}: {text}", changes=changes)
    where = text_of("failed in").format(whose=f"LMDeploy {version or ''}".strip(), file=file)
    return WhoseFault("program_bug", "", where, (fault, text_of("bad input")), changes)


def _package_of(path: str) -> str:
    """Return the package that a file belongs to; empty for a file of a person's own."""
    found = _PACKAGE.search(path)
    return next(filter(None, found.groups()), "") if found else ""
