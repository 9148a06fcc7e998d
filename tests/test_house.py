"""The house itself: budgets of its rooms, files that are subjects, imports without a circle."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, get_args

import pytest

from turbofit.core.plan import EngineName

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "turbofit").rglob("*.py"))
MOST_LINES = 800
MOST_FUNCTION_LINES = 60
#: Lines of Python of each room, and of tests and benches. A change that makes one smaller lowers
#: its figure here; a room goes over its figure only where another pays, with the reason beside it.
#: A room that stands in no line has no budget.
BUDGETS = {
    "core": 5_987,  # ends of engines, lines of shells, slices, a full disk, signals, sums
    "machine": 3_125,  # nvidia-smi's tables, a host's cores, slices, slow cards, a card in steps
    "kernels": 625,
    "model": 6_580,  # loading of Transformers came from memory; each tower's list of tensors
    "memory": 6_745,  # engines answer for their formulas; ranks by their tensors; fatal batches
    "tuner": 6_695,  # towers, how sure each kind is, the host, bounds of searches, lowered images
    "planning": 3_845,  # the list of checks came from diagnose and launch; files of one subject
    "observe": 1_700,  # kinds of deaths, readers of logs that keep forms of lines
    "pretend": 1_940,
    "rehearse": 4_430,  # rooms of forwards, stand-ins of LLaVA and Llama-3.2-Vision
    "gateway": 9_335,  # the page and what it asks for, connections after bodies, its options
    "load": 1_520,  # what asks for a person came from cli
    "launch": 11_833,  # kept kernels, images on threads and resized, standby, checks, garbage
    "batch": 1_685,
    "diagnose": 4_220,  # other programs in one line, servers that stand still, what people tell
    "report": 5_085,  # views, and looks at servers that run, came from cli; faults that which names
    "cli": 4_425,  # lines of other programs, their cards, those of profiles too
    "turbofit": 430,  # a door of Python with its own words, those of a batch too
    "tests": 58_700,  # slices, rows that only judge; a checkpoint by hand; resizing to the bit
    "tests/support": 3_650,  # leftovers of a run, stand-ins that stand by, plans without limits
    "bench": 13_975,  # front ends alone, bench.images, bench.gateway.large, a sheet for a judge
}
#: Functions of the package that decide so many things and more: how many there may be. It only
#: falls: a function that decides ten things is three with names, or a type with cases.
MOST_DECIDING = {15: 0, 20: 0, 26: 0}
#: Public functions that raise and do not say what: readers of families, whose `Reader` says it, and
#: callbacks of libraries. It only falls.
MOST_SILENT = 27
#: A budget that is further above what it allows for than this is lowered.
SLACK = 150
#: Modules of fewer lines that one module beside them imports, and nobody else: they belong into it.
FRAGMENT_LINES = 80
#: Where a registry chooses a module by its name, or docs/adding.md tells people to add one.
REGISTRIES = {"model/families", "core/images", "cli/commands"}
#: How many there are elsewhere. It only falls.
MOST_FRAGMENTS = 0


Trees = dict[Path, ast.Module]


@pytest.fixture(scope="module")
def trees() -> Trees:
    """The package's files, which take a second to parse."""
    return {path: ast.parse(path.read_text()) for path in PACKAGE}


@pytest.fixture(scope="module")
def imports(trees: Trees) -> dict[str, set[str]]:
    """What each module of the package imports of the package."""
    names = {_module(path) for path in trees}
    return {_module(path): _imported(tree, names) - {_module(path)} for path, tree in trees.items()}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _lines(path: Path) -> int:
    return path.read_text().count("\n")


@cache
def walked(tree: ast.Module) -> list[ast.AST]:
    """All nodes of a file, which eight tests go through."""
    return list(ast.walk(tree))


def where(trees: Trees, find: Callable[[ast.Module], Any]) -> dict[str, Any]:
    """What is found in files of the package, by their places."""
    return {
        str(path.relative_to(ROOT)): found for path, tree in trees.items() if (found := find(tree))
    }


def _room(path: Path) -> str:
    """The room of a module, or the folder of another file; of `turbofit` itself `turbofit`."""
    first, *rest = path.relative_to(ROOT).parts
    if first == "tests" and rest[0] == "support":
        return "tests/support"
    return rest[0] if first == "turbofit" and len(rest) > 1 else first


def test_rooms_keep_to_their_budgets() -> None:
    now = Counter[str]()
    for folder in ("turbofit", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            now[_room(path)] += _lines(path)
    assert {room: lines for room, lines in now.items() if lines > BUDGETS.get(room, 0)} == {}
    assert {room: now[room] for room in BUDGETS if now[room] < BUDGETS[room] - SLACK} == {}, (
        "these rooms are smaller than their budgets: lower them"
    )


def test_a_file_is_a_subject(trees: Trees) -> None:
    """It can be read at one sitting, and says first what it is for."""
    found = []
    for path, tree in trees.items():
        if _lines(path) > MOST_LINES or not ast.get_docstring(tree):
            found.append(str(path.relative_to(ROOT)))
        for node in walked(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno
                if lines - len((ast.get_docstring(node) or "").splitlines()) > MOST_FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert found == []


def decisions(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Branches, loops, `with`s, and parts of conditions; a function inside counts for itself."""
    alone = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    single = (
        ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith,
        ast.ExceptHandler, ast.match_case,
    )  # fmt: skip
    count, nodes = 0, list(ast.iter_child_nodes(function))
    for node in nodes:
        if isinstance(node, alone):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, single):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def test_functions_decide_few_things(trees: Trees) -> None:
    text = "def f(a):\n    def g():\n        if a: pass\n    return [b for b in a if b and a] or 1"
    (bad,) = ast.parse(text).body
    assert isinstance(bad, ast.FunctionDef)
    assert decisions(bad) == 4
    found = sorted(
        (decisions(node), f"{path.relative_to(ROOT)}: {node.name}")
        for path, tree in trees.items()
        for node in walked(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    for many, most in MOST_DECIDING.items():
        names = [name for count, name in found if count >= many]
        assert len(names) <= most, names


def test_small_modules_are_joined_to_what_uses_them(imports: dict[str, set[str]]) -> None:
    """Those with a single importer, which stands in the same folder."""
    names = {_module(path): path for path in PACKAGE}
    importers: dict[str, set[str]] = {}
    for name, modules in imports.items():
        for imported in modules:
            importers.setdefault(imported, set()).add(name)
    fragments = [
        name
        for name, users in importers.items()
        if len(users) == 1
        and names[name].name != "__init__.py"
        and _lines(names[name]) < FRAGMENT_LINES
        and names[min(users)].parent == names[name].parent
        and str(names[name].parent.relative_to(ROOT / "turbofit")) not in REGISTRIES
    ]
    assert len(fragments) <= MOST_FRAGMENTS, fragments


def test_imports_make_no_circle(imports: dict[str, set[str]]) -> None:
    """Inside rooms too, and also of imports in functions and for types alone."""
    assert sum(map(len, imports.values())) > len(imports), "imports are found"
    TopologicalSorter(imports).prepare()  # its CycleError names the files


def test_no_docstring_begins_with_of(trees: Trees) -> None:
    """Its first sentence names what it is about."""
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path, tree in trees.items()
        for node in walked(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and (text := ast.get_docstring(node) or "").startswith("Of ")
    ]
    assert found == []


def silent_raisers(tree: ast.Module) -> list[str]:
    """Public functions with a docstring that make an error, and do not say which."""
    found = []
    for outer in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
        for node in outer.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            text = ast.get_docstring(node) or ""
            said = re.search(r"Raises:|\b\w+Error\b|`Refusal`|`Died`", text)
            raised = (n.exc for n in ast.walk(node) if isinstance(n, ast.Raise))
            makes = any(isinstance(error, ast.Call) for error in raised)
            if makes and text and not said and not node.name.startswith("_"):
                found.append(node.name)
    return found


def test_public_functions_say_what_they_raise(trees: Trees) -> None:
    text = "def f():\n '.'\n raise A(1)\ndef g():\n 'An `AError`.'\n raise AError(1)"
    assert silent_raisers(ast.parse(text)) == ["f"]
    names = [name for found in where(trees, silent_raisers).values() for name in found]
    assert len(names) <= MOST_SILENT, names


def _imported(tree: ast.Module, names: set[str]) -> set[str]:
    """The modules among ``names`` that a file imports."""
    found: set[str] = set()
    for node in walked(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in names else node.module)
    return found & names


def asks_for_class(tree: ast.Module, rules: set[str]) -> list[int]:
    """Lines that ask for the class of an image rule, or for what stands for it: its unit's name."""
    found = []
    for node in walked(tree):
        names, asked = set(rules), node
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = node.args[1]
        elif isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in sides):
                names |= {"unit_name", "units_name", "vision_unit"}
        elif not isinstance(node, ast.MatchClass):
            continue
        if names & set(re.findall(r"\w+", ast.unparse(asked))):
            found.append(node.lineno)
    return found


def test_nobody_asks_an_image_rule_for_its_class(trees: Trees) -> None:
    """A rule answers (`turbofit/core/images/rule.py`): so a new one is a file, not thirty edits."""
    folder = ROOT / "turbofit" / "core" / "images"
    rules = {
        node.name
        for path, tree in trees.items()
        if path.parent == folder
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Rule")
    }
    assert {"ImageRule", "BaseTileRule", "TileRule", "PatchRule"} <= rules
    for text in (
        "isinstance(rule, (images.TileRule, int))", "type(rule) is PatchRule",
        "match rule:\n    case PatchRule(): pass", "limits.vision_unit == 'tile'",
    ):  # fmt: skip
        assert asks_for_class(ast.parse(text), rules), text
    assert not asks_for_class(ast.parse("limits.vision_unit is None or isinstance(x, int)"), rules)
    others = {path: tree for path, tree in trees.items() if path.parent != folder}
    assert where(others, lambda tree: asks_for_class(tree, rules)) == {}


def asks_for_engine(tree: ast.Module) -> list[int]:
    """Lines that compare something with the name of an engine; packages have such names too."""
    names = set(get_args(EngineName))
    found = []
    for node in walked(tree):
        if isinstance(node, ast.Compare):
            sides: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        for side in sides:
            texts = {it.value for it in ast.walk(side) if isinstance(it, ast.Constant)}
            if texts & names and texts <= names | {"auto"}:
                found.append(node.lineno)
    return found


def test_nobody_asks_an_engine_for_its_name(trees: Trees) -> None:
    """`Engine` answers for planning, and `PlannedEngine` for a plan."""
    for text in (
        "engine == 'pytorch'", "plan.engine.name != 'turbomind'", "x in ('auto', 'transformers')",
        "match name:\n    case 'pytorch': pass",
    ):  # fmt: skip
        assert asks_for_engine(ast.parse(text)), text
    # A package, and a table.
    assert not asks_for_engine(ast.parse("x in ('torch', 'transformers')\nt = {'pytorch': 1}[x]"))
    answers = ("core/plan.py", "memory/account.py", "memory/engines.py")
    folders = (f"memory/{name}/" for name in get_args(EngineName))
    allowed = tuple(f"turbofit/{name}" for name in (*answers, *folders))
    assert [name for name in where(trees, asks_for_engine) if not name.startswith(allowed)] == []


#: Words that say nothing of what they name, or name what the field has a noun for (a request's
#: context, an exchange, a coordinator); and where one stands all the same.
EMPTY_WORDS = frozenset(
    {
        "asked", "own", "attend", "bought", "carrier", "clerk", "fate", "judge", "judged", "keeper",
        "meter", "relay", "roster", "starved",
    }
)  # fmt: skip
#: `End.asked` is a key of the published plan.
PUBLISHED_WORDS = {
    "turbofit/core/engine_end.py", "turbofit/rehearse/confirm.py",
    "turbofit/launch/engine/engine_log.py", "turbofit/launch/engine/pretended.py",
"turbofit/launch/serve/ladder.py",
    "turbofit/report/views/run_view.py",
}  # fmt: skip


def identifiers(tree: ast.Module) -> set[str]:
    """All names in a file: of variables, attributes, arguments, functions, classes and modules."""
    fields = ("id", "attr", "name", "arg", "asname", "module")
    found = {getattr(node, field, None) for node in walked(tree) for field in fields}
    return {name for name in found if isinstance(name, str)}


def empty_words(names: set[str]) -> set[str]:
    """Names with a part, by underscores, capitals or dots, that is one of `EMPTY_WORDS`."""
    return {
        name
        for name in names
        if EMPTY_WORDS & set(re.findall(r"[a-z0-9]+", re.sub("([A-Z])", r"_\1", name).lower()))
    }


def test_no_name_is_an_empty_word(trees: Trees) -> None:
    """What is `asked` is an engine, a load or a limit; what is somebody's `own` is a thing too."""
    bad = ast.parse("asked = x.own_limit\nclass Own: pass\nf(asked=1)\nfrom a.own_view import b")
    assert empty_words(identifiers(bad)) == {"asked", "own_limit", "Own", "a.own_view"}
    assert empty_words({"NvmlMeter", "_judged", "Carrier"}) == {"NvmlMeter", "_judged", "Carrier"}
    assert not empty_words(identifiers(ast.parse("owner = known.parameter(task='its own')")))
    found = {
        name: words
        for path, tree in trees.items()
        if (words := empty_words({*identifiers(tree), path.stem}))
        and not ((name := str(path.relative_to(ROOT))) in PUBLISHED_WORDS and words == {"asked"})
    }
    assert found == {}


def bare_objects(tree: ast.Module) -> list[str]:
    """Public functions whose signature has an object of JSON that does not say whose it is."""
    found = []
    for outer in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
        if getattr(outer, "name", "").startswith("_"):
            continue
        for node in outer.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if node.name.startswith("_") and not node.name.startswith("__"):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            texts = [ast.unparse(a) for a in (*(g.annotation for g in given), node.returns) if a]
            if any(re.search(r"\b(dict|Mapping)\[str, Any\]", text) for text in texts):
                found.append(node.name)
    return found


def test_signatures_say_whose_an_object_of_json_is(trees: Trees) -> None:
    """`core.json_types` has a name for each kind; a struct is better where the document is ours."""
    for text in (
        "def f(a: dict[str, Any]): pass", "async def f(*, a: Mapping[str, Any] | None): pass",
        "class A:\n    def f(self) -> list[dict[str, Any]]: pass",
    ):  # fmt: skip
        assert bare_objects(ast.parse(text)) == ["f"]
    assert not bare_objects(ast.parse("def _f(a: dict[str, Any]): pass\ndef g(a: Options): pass"))
    assert where(trees, bare_objects) == {}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git here: an sdist")
def test_no_machine_path_or_registry_is_committed() -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    bad = re.compile(r"(?<![\w.])/(work|farm|root|home)/\w")
    found = []
    for name in names:
        path = ROOT / name
        if path.suffix in {".py", ".c", ".h", ".md", ".toml", ".yaml", ".sh", ".txt"}:
            text = path.read_text(errors="replace")
            found += [name for _ in bad.finditer(text)]
    allowed = {"tests/test_house.py"}
    assert set(found) - allowed == set()


def test_ray_is_imported_in_one_module() -> None:
    """Ray moves its private calls between versions: one file is to be looked at then."""
    importing = re.compile(r"^\s*(import|from) ray\b|import(_module|__)\([\"']ray\b", re.MULTILINE)
    found = [path for path in PACKAGE if importing.search(path.read_text())]
    assert found == [ROOT / "turbofit" / "launch" / "cluster" / "ray_adapter.py"]
