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

    ``what`` is empty if the log proves no cause; ``possible`` then has what others had.
    """

    kind: str
    what: str
    possible: tuple[str, ...]
    changes: tuple[str, ...]


def whose_fault(mark: LogEvent, case: LogCase) -> WhoseFault | None:
    """Return the answer to an error of code; None for another line, or for a person's own files."""
    text = mark.text.strip()
    of_code = _OF_CODE.match(text) is not None
    if not isinstance(mark.event, PythonError) or not (of_code or _OF_LMDEPLOY.match(text)):
        return None
    paths = [frame.path for frame in mark.stack if not _PASSES_ON.search(frame.path)]
    owners = [_package_of(path) for path in paths]
    owner = owners[-1] if owners else ""
    if owner == "lmdeploy":
        certain = _CERTAIN.match(text) is not None
        own = owners[-2:] == [owner, owner] or (certain and len(owners) == 1)
        return _of_lmdeploy(mark, paths[-1], case, certain=certain) if own else None
    if not owner or not of_code:
        return None
    if owner == _CHECKPOINT:
        possible, step = text_of("checkpoint at fault"), text_of("fitting transformers")
    else:
        named = f"{owner} {case.subject.packages.get(owner, '')}".strip()
        possible = text_of("package at fault").format(name=named)
        step = text_of("fitting package").format(package=owner)
    return WhoseFault("package_versions", "", (possible,), (step,))


def _of_lmdeploy(mark: LogEvent, path: str, case: LogCase, *, certain: bool) -> WhoseFault:
    """Return the answer to an error between LMDeploy's files, of which ``path`` is innermost."""
    subject = case.subject
    release = f"LMDeploy {subject.version}" if subject.version else "this release of LMDeploy"
    file = re.split(r"[/\\]", path)[-1]
    said = f"a fault of {release}, in {file}, which its own code called"
    than = f"than {subject.version} " if subject.version else ""
    newer = text_of("newer lmdeploy").format(than=than)
    ascend = (text_of("newer dlinfer"),) if "ascend" in subject.facts else ()
    if certain:
        return WhoseFault("program_bug", f"{said}: {mark.text.strip()}", (), (newer, *ascend))
    return WhoseFault("program_bug", "", (said, text_of("bad input")), (newer, *ascend))


def _package_of(path: str) -> str:
    """Return the package that a file belongs to; empty for a file of a person's own."""
    found = _PACKAGE.search(path)
    return next(filter(None, found.groups()), "") if found else ""
