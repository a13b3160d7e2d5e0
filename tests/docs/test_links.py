"""Links between the documents, and the index of the documentation."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
INDEX = (DOCS / "README.md").read_text()


def anchors(page):
    """Return the anchors of a page's headings, as GitHub derives them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", ["howto", "explanation", "reference", "decisions"])
def test_index_names_every_page(folder):
    text = INDEX + (DOCS / "decisions" / "README.md").read_text() + (ROOT / "ARCHITECTURE.md").read_text()
    names = [page.name for page in (DOCS / folder).glob("*.md") if page.name != "README.md"]
    assert [name for name in names if f"/{name})" not in text and f"]({name})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_name_existing_files_and_headings(page):
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    missing = []
    for path, anchor in links:
        if path.startswith(("http://", "https://")):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(f"{path}#{anchor}" if anchor else path)
    assert missing == []
