"""The site: writes the pages that are generated, checks what can be checked without running anything, and builds.

    python .ci/docs.py write                  # docs/configuration.md and docs/api.md, from configs/ and the docstrings
    python .ci/docs.py check                  # they are what `write` would write; troubleshooting.md shows the code's messages
    python .ci/docs.py build MKDOCS           # check, gather the pages in build/docs, build build/site: warnings are errors

Pages link to each other and into the repository as files do, so that they read as well in the checkout. For the site, the pages
outside docs/ that are linked to are gathered beside those inside, and other files as text.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the files of configs/

from pages import api, configuration, messages  # noqa: E402

DOCS, PAGES, SITE = ROOT / "docs", ROOT / "build" / "docs", ROOT / "build" / "site"
GENERATED = {DOCS / "configuration.md": configuration.page, DOCS / "api.md": api.page}
OTHERS = (
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "bundled/README.md",
    "notebooks/README.md",
)  # pages of the site that lie outside docs/
ASSETS = (".svg", ".png", ".css")
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
MARK = re.compile(r"^<!-- (?:not run|exits): [^\n]* -->\n", re.MULTILINE)


def write() -> None:
    for path, page in GENERATED.items():
        path.write_text(page())


def check() -> None:
    for path, page in GENERATED.items():
        if path.read_text() != page():
            sys.exit(f"error: {path.relative_to(ROOT)} is out of date: run python .ci/docs.py write")
    text = (DOCS / "troubleshooting.md").read_text()
    shown = messages.shown(text)
    if not shown:
        sys.exit("error: docs/troubleshooting.md shows no message")
    if unknown := messages.unknown(shown):
        sys.exit("error: docs/troubleshooting.md shows messages that no code says:\n  " + "\n  ".join(unknown))
    print(f"generated pages are up to date; {len(shown)} messages of docs/troubleshooting.md are the code's")


def gather() -> None:
    """Copies the pages to build/docs, with links that are right there."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in sorted(DOCS.rglob("*")):
        if path.suffix in ASSETS:
            _copy(path)
    for path in [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in OTHERS)]:
        target = PAGES / _place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = MARK.sub("", path.read_text())
        target.write_text(LINK.sub(lambda link, path=path: _relinked(link, path), text))


def _place(path: Path) -> Path:
    """Where a file of the repository lies below build/docs."""
    inside = path.relative_to(DOCS) if path.is_relative_to(DOCS) else path.relative_to(ROOT)
    return inside if path.suffix in (".md", *ASSETS) else inside.with_name(inside.name + ".txt")


def _copy(path: Path) -> None:
    target = PAGES / _place(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _relinked(link: re.Match, page: Path) -> str:
    """A link as it has to be in the site. To a folder: to its README, or no link. To README.md: to the site's first page."""
    label, target = link.groups()
    where, _, anchor = target.partition("#")
    if not where or "://" in where:
        return link[0]
    path = (page.parent / where).resolve()
    if path.is_dir():
        path = path / "README.md"
        if not path.exists():
            return label.strip("![]")
    if path == ROOT / "README.md":
        path = DOCS / "index.md"
    if not path.exists():
        return link[0]  # mkdocs says so
    if path.suffix != ".md":
        _copy(path)
    up = "../" * len(_place(page).parent.parts)
    return f"{label}({up}{_place(path)}{'#' + anchor if anchor else ''})"


def build(mkdocs: str) -> None:
    check()
    gather()
    subprocess.run([mkdocs, "build", "--strict", "--clean", "--config-file", str(ROOT / "mkdocs.yml")], check=True)
    print(f"{SITE.relative_to(ROOT)}/index.html: {len(list(SITE.rglob('*.html')))} pages")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write"]:
            write()
        case ["check"]:
            check()
        case ["build", mkdocs]:
            build(mkdocs)
        case _:
            sys.exit(__doc__)
