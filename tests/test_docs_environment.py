"""`docs/environment.md` names the environment variables that turbofit reads or sets, no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: A table's row: the variable, and whether it is read, set or both.
ROW = re.compile(r"^\| `([A-Z][A-Z0-9_]+)` \| (?:read|set|read, set) \| \S", re.MULTILINE)
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
#: Strings that look like variables: a word in a sentence, the tests' own variable, values, types of
#: tensors, constants of C and of NVML.
OTHERS = re.compile(
    r"COMMAND_OPTION|TURBOFIT_CUDA_PATH|FIRST_COMPLETED|PCI_BUS_ID|F[68]_E\dM\d(FNUZ)?|F8_E8M0|(O|TCP|P2P|NVML_NVLINK)_[A-Z_]+"
)


def test_the_table_names_the_variables_of_the_code() -> None:
    names: set[str] = set()
    texts: set[str] = set()
    for path in (ROOT / "turbofit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            names.update(str(getattr(node, field, "")) for field in ("id", "name", "attr"))
    other = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "turbofit").rglob("*.c"))
    other += (ROOT / "presets" / "export" / "compose.template").read_text(encoding="utf-8")
    rows = ROW.findall((ROOT / "docs" / "environment.md").read_text(encoding="utf-8"))
    assert len(rows) == len(set(rows)), "a variable stands twice"
    used = {one for one in texts - names if VARIABLE.fullmatch(one) and not OTHERS.fullmatch(one)}
    assert used - set(rows) == set()
    # `HOME` is what `expanduser` reads.
    unused = [one for one in rows if one not in texts and not re.search(rf"\b{one}\b", other)]
    assert unused in ([], ["HOME"])
