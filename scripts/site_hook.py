"""MkDocs' hook: what the site has beside `docs`, and links that work on GitHub and on the site.

A page links as GitHub needs it: relative to its file in the repository. The site holds README,
CONTRIBUTING, CHANGELOG and the pages of the benches too, and the files that any page links to.
"""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File, InclusionLevel
from mkdocs.structure.nav import Navigation

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts.reference import SCHEMAS, reference_pages  # noqa: E402 - MkDocs loads this file by its path

if TYPE_CHECKING:
    from typing import Any

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_LOG: Final = logging.getLogger("mkdocs.hooks.site")
#: The start page of the site in each language.
_START: Final = {"README.md": "index.md", "README.zh-CN.md": "zh/index.md"}
_OUTSIDE: Final = (
    "README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/**/*.md",
    "turbofit/**/*.md",
)  # fmt: skip
_LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
#: What README says to developers; the site says there what people can try next.
_CHECKS: Final = re.compile(
    r"(People who change turbofit run all checks|修改 turbofit 的人运行全部检查)"
    r".*?\./scripts/check\n",
    re.DOTALL,
)
_FIRST_STEPS: Final = {"index.md": """\
Which cards serve a model, which models a machine serves, and a whole server without a GPU:

    turbofit which internvl3-8b             # every card by name, with the fewest GPUs that do
    turbofit which --on 1xrtx3090           # every model on this machine
    turbofit serve internvl2-2b --pretend --on 1xrtx3090  # answers requests; its words mean nothing
""", "zh/index.md": """\
哪些显卡能运行某个模型，某台机器能运行哪些模型，以及不需要 GPU 的完整服务：

    turbofit which internvl3-8b             # 列出每种显卡，以及最少需要几张
    turbofit which --on 1xrtx3090           # 这台机器能运行的全部模型
    turbofit serve internvl2-2b --pretend --on 1xrtx3090  # 能回答请求，但文字没有意义
"""}  # fmt: skip
#: Each language, its name in the switch, and the folder of its pages.
_LANGUAGES: Final = (("en", "English", ""), ("zh", "中文", "zh/"))
#: The end of a line after a Chinese letter or sign, where browsers would show a space.
_CHINESE_BREAK: Final = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=[\u3000-\u9fff\uff00-\uffef])"
    r"|(?<=[\u3001\u3002\uff09\uff0c\uff1a\uff1b])\n *(?=[A-Za-z`\"\[])"
)
_ALTERNATE: Final = re.compile(r"<link rel=\"?alternate[^>]*>")
_CODE_SPAN: Final = re.compile(r"(`[^`]*`)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages outside `docs`, the files that pages link to, and the generated reference."""
    pages = {place: path for glob in _OUTSIDE for path in sorted(ROOT.glob(glob))
             if (place := _site_path(path)) not in files.src_uris}  # fmt: skip
    for place, path in pages.items():
        files.append(_file(config, place, path))
    sources = [*pages.values(), *(ROOT / "docs").rglob("*.md")]
    linked = {target for source in sources for target in _linked(source)}
    for path in sorted({*linked, *SCHEMAS, ROOT / "scripts" / "iframe-worker.js"}):
        if _site_path(path) not in files.src_uris:
            files.append(_file(config, _site_path(path), path))
    for place, text in reference_pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """The page with links to where their targets are on the site."""
    path = page.file.abs_src_path
    if path is None:
        return markdown
    steps = _FIRST_STEPS.get(page.file.src_uri)
    if steps:
        markdown = _CHECKS.sub(steps, markdown)
    if steps or "\n## " not in markdown:
        page.meta["hide"] = ["toc"]  # commands and tables are as wide as the page
    source = Path(path)

    def moved(link: re.Match[str]) -> str:
        target = _target(source, link[3])
        if _site_path(target) not in files.src_uris:
            if not target.exists():
                _LOG.warning("%s links to %s, which does not exist", source.name, link[3])
            return link[2]  # a folder: the site has none
        start = posixpath.dirname(_site_path(source)) or "."
        there = posixpath.relpath(_site_path(target), start)
        return f"{link[1]}[{link[2]}]({there}{link[4] or ''})"

    markdown = _CHINESE_BREAK.sub("", _LINK.sub(moved, markdown))
    return "\n".join(_cells(line) for line in markdown.split("\n"))


def on_nav(nav: Navigation, **_: object) -> None:
    """The Chinese pages are no continuation of the English ones."""
    first = next(page for page in nav.pages if page.file.src_uri == "zh/index.md")
    if first.previous_page is not None:
        first.previous_page.next_page = first.previous_page = None


def on_page_context(
    context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Navigation
) -> None:
    """The words around a page in its language, and a switch to the page in the other one.

    A page without a twin leads to the start of the other language. Material reads all of this from
    the configuration, while it renders the page.
    """
    own = "zh/" if page.file.src_uri.startswith("zh/") else ""  # the folder of its language
    addresses = {one.file.src_uri: one.url for one in nav.pages}
    name = page.file.src_uri.removeprefix("zh/")
    config.theme["language"] = "zh" if own else "en"
    switch = []
    for lang, title, folder in _LANGUAGES:
        twin = addresses.get(f"{folder}{name}") or addresses[f"{folder}index.md"]
        switch.append({"lang": lang, "name": title, "link": page.url if folder == own else twin})
    config.extra["alternate"] = switch
    config.extra["homepage"] = addresses[f"{own}index.md"]
    *english, chinese = nav.items
    context["nav"] = Navigation([chinese, *english] if own else english, nav.pages)


def on_post_page(output: str, **_: object) -> str:
    """The page without links for which Material would ask a server for a map of the site."""
    return _ALTERNATE.sub("", output)


def _cells(line: str) -> str:
    """A table's row, written for GitHub, as Python-Markdown reads it.

    A bar in code has a backslash before it on GitHub alone; ``[TM][FATAL]`` of a log is no link.
    """
    if not line.startswith("|"):
        return line
    pieces = _CODE_SPAN.split(line)
    pieces[::2] = [text.replace("][", "]\\[") for text in pieces[::2]]
    pieces[1::2] = [code.replace("\\|", "|") for code in pieces[1::2]]
    return "".join(pieces)


def _file(config: MkDocsConfig, place: str, path: Path) -> File:
    in_nav = "/" not in place or place in {"bench/README.md", "zh/index.md"}
    level = InclusionLevel.INCLUDED if in_nav else InclusionLevel.NOT_IN_NAV
    return File.generated(config, place, abs_src_path=str(path), inclusion=level)


def _linked(source: Path) -> set[Path]:
    """Files of the repository that a page links to."""
    found = {_target(source, link[3]) for link in _LINK.finditer(source.read_text("utf-8"))}
    return {path for path in found if path.is_file()}


def _target(source: Path, link: str) -> Path:
    return Path(posixpath.normpath((source.parent / link).as_posix()))


def _site_path(path: Path) -> str:
    """Where a file of the repository is on the site, as MkDocs names its source."""
    place = path.relative_to(ROOT).as_posix()
    return _START.get(place) or place.removeprefix("docs/")
