"""Builds the documentation site from the Markdown files, with the navigation of docs/README.md.

    python scripts/make_site.py [FOLDER]

Writes to FOLDER (`.cache/site/html` by default). Fails for a page that docs/README.md does not name, for a link to a
page or heading that does not exist, and for a page that loads anything from another server.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / ".cache" / "site"
HOME = "README.md"
INDEX = "docs/README.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]+)?\)")
# The tables next to the diagrams say the same. Mermaid's program would be loaded from another server.
DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n", re.DOTALL | re.MULTILINE)
# Before the first heading, it would hide the title of the page from mkdocs.
NOTE = re.compile(r"\A<!--.*?-->\s*", re.DOTALL)
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
GROUP = re.compile(r"^### (.+)$", re.MULTILINE)
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src"), ("use", "href")}
IN_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)")


def main(folder: Path) -> int:
    """Build the site; return the exit code."""
    shutil.rmtree(SITE, ignore_errors=True)
    pages = stage(SITE / "pages")
    navigation = [{"Home": HOME}, *make_navigation((ROOT / INDEX).read_text(), pages)]
    config = SITE / "mkdocs.yml"
    # JSON is YAML.
    config.write_text(
        json.dumps(
            {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": "pages", "site_dir": str(folder), "nav": navigation}
        )
    )
    # Not --quiet: it would also hide warnings from --strict. The variable is Material's own.
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if build.returncode:
        print(build.stdout + build.stderr, file=sys.stderr)
        return build.returncode
    external = list(find_external(folder))
    for line in external:
        print(line, file=sys.stderr)
    return 1 if external else 0


def stage(target: Path) -> list[str]:
    """Copy the pages and their pictures; return the paths of the pages. Links to other files become plain text."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.svg")]
    names = {path.relative_to(ROOT).as_posix() for path in files}
    for path in files:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(
            for_site(path.read_text(), path.relative_to(ROOT), names) if path.suffix == ".md" else path.read_text()
        )
    return sorted(name for name in names if name.endswith(".md"))


def for_site(text: str, page: Path, names: set[str]) -> str:
    """Return a page without the note of `make docs`, diagrams, and links to files that are not part of the site."""

    def link(match: re.Match[str]) -> str:
        path = match[3]
        if not path or urlsplit(path).scheme:
            return match[0]
        target = (ROOT / page.parent / path).resolve()
        return match[0] if not target.is_relative_to(ROOT) or target.relative_to(ROOT).as_posix() in names else match[2]

    return LINK.sub(link, DIAGRAM.sub("", NOTE.sub("", text)))


def make_navigation(index: str, pages: list[str]) -> list[dict[str, object]]:
    """Return the navigation: the sections of the index, their groups, and the pages in the order of the links."""
    seen = {HOME}
    sections: list[dict[str, object]] = []
    for title, text in split(SECTION, index):
        entries: list[object] = [INDEX] if not sections else []
        seen |= {INDEX}
        for group, part in split(GROUP, text):
            found = [path for path in dict.fromkeys(links(part)) if path in pages and path not in seen]
            seen |= {*found}
            items = [page for path in found for page in with_folder(path, pages)]
            entries += [{group: items}] if group else items
        sections.append({title: entries})
    return sections


def with_folder(path: str, pages: list[str]) -> list[object]:
    """Return a page as an entry of the navigation; an index of a folder with the other pages of the folder."""
    if not path.endswith("/README.md"):
        return [path]
    folder = path.removesuffix("README.md")
    return [
        {Path(folder).name.capitalize(): [path, *(page for page in pages if page.startswith(folder) and page != path)]}
    ]


def split(heading: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of each part of a text. Text before the first heading has the title "", if it has links."""
    first, *rest = heading.split(text)
    if LINK.search(first) and heading is GROUP:
        yield "", first
    yield from zip(rest[::2], rest[1::2], strict=True)


def links(text: str) -> Iterator[str]:
    """Yield the paths that a part of the index links to, from the root of the checkout."""
    for match in LINK.finditer(text):
        path = (ROOT / INDEX).parent / match[3]
        if match[3] and not urlsplit(match[3]).scheme:
            yield path.resolve().relative_to(ROOT).as_posix()


def find_external(folder: Path) -> Iterator[str]:
    """Yield a line for each reference with which a browser would load something from another server."""
    for page in sorted(folder.rglob("*.html")):
        parser = _References()
        parser.feed(page.read_text())
        for url in parser.found:
            yield f"{page.relative_to(folder)}: loads {url}"
    for style in sorted(folder.rglob("*.css")):
        for url in IN_STYLES.findall(style.read_text()):
            yield f"{style.relative_to(folder)}: loads {url}"


class _References(HTMLParser):
    """Collects the URLs that a browser loads with a page and that are not part of the site."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        canonical = ("rel", "canonical") in attrs
        for name, value in attrs:
            if (tag, name) in LOADED and value and not canonical and urlsplit(value).netloc:
                self.found.append(value)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if sys.argv[1:] else SITE / "html"))
