"""scripts/make_site.py, which `make check` runs on the whole documentation."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_site.py"
site = runpy.run_path(str(SCRIPT))
ENABLE_TLS, STYLE = "docs/howto/enable-tls.md", "docs/style.md"
DECISIONS = ["docs/decisions/README.md", "docs/decisions/0006-part-names.md"]
PAGES = ["README.md", "docs/README.md", ENABLE_TLS, STYLE, *DECISIONS]
INDEX = """
# Title

## How to

### Start

- [TLS](howto/enable-tls.md)
- [the same](howto/enable-tls.md#test), [web](https://example.com)

## More

- [style](style.md), [decisions](decisions/README.md)
"""


def test_navigation_has_the_sections_groups_and_pages_of_the_index():
    assert site["make_navigation"](INDEX, PAGES) == [
        {"How to": ["docs/README.md", {"Start": [ENABLE_TLS]}]},
        {"More": [STYLE, {"Decisions": DECISIONS}]},
    ]


@pytest.mark.parametrize(
    ("text", "in_the_site"),
    [
        ("<!-- Made by x. -->\n\n# T", "# T"),
        (
            "[page](../style.md#x) [here](#y) [web](https://example.com)",
            "[page](../style.md#x) [here](#y) [web](https://example.com)",
        ),
        ("the file [`config.py`](../../src/thrave/config.py).", "the file `config.py`."),
        ("a\n\n```mermaid\nx --> y\n```\n\nb", "a\n\n\nb"),
    ],
)
def test_page_loses_what_the_site_does_not_have(text, in_the_site):
    assert site["for_site"](text, Path(ENABLE_TLS), {*PAGES}) == in_the_site


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.html", '<script src="https://example.com/x.js"></script>', ["a.html: loads https://example.com/x.js"]),
        ("a.html", '<link rel="preconnect" href="//fonts.example.com">', ["a.html: loads //fonts.example.com"]),
        ("a.css", "a{background:url(https://example.com/x.png)}", ["a.css: loads https://example.com/x.png"]),
        ("a.html", '<a href="https://example.com/">x</a><img src="x.svg"><link rel="canonical" href="https://x/">', []),
        ("a.css", "a{background:url('data:image/svg+xml;x')}", []),
    ],
)
def test_find_external_names_what_a_page_loads_from_other_servers(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert list(site["find_external"](tmp_path)) == found


def test_site_has_each_page_and_its_search_index(tmp_path):
    pytest.importorskip("mkdocs")
    subprocess.run([sys.executable, SCRIPT, tmp_path / "site"], check=True)
    assert "<title>Run the service" in (tmp_path / "site/docs/howto/run-the-service/index.html").read_text()
    assert "BundleInstance" in (tmp_path / "site/search/search_index.json").read_text()
