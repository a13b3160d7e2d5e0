"""What a package index shows of Thrave."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DESCRIPTION = (ROOT / PROJECT["readme"]).read_text()
SITE = PROJECT["urls"]["Homepage"]


def test_each_link_of_the_long_description_is_absolute_and_names_a_page_of_the_repository():
    links = re.findall(r"\]\(([^)\s]+)\)", DESCRIPTION)
    assert links
    assert [link for link in links if not link.startswith(SITE)] == []
    assert [link for link in links if not (ROOT / link.removeprefix(SITE)).is_file()] == []


def test_urls_of_pages_name_files_of_the_repository():
    urls = PROJECT["urls"]
    assert {"Source", "Documentation", "Changelog", "Issues"} <= urls.keys()
    pages = [url.removeprefix(SITE) for url in urls.values() if url.endswith(".md")]
    assert pages
    assert [page for page in pages if not (ROOT / page).is_file()] == []


def test_summary_fits_in_a_list_of_an_index():
    assert len(PROJECT["description"]) <= 100


def test_each_extra_for_users_is_in_the_page_about_installing():
    page = (ROOT / "docs/howto/install-and-upgrade.md").read_text()
    for_contributors = {"bench", "dev", "docs", "package"}
    assert [
        extra for extra in PROJECT["optional-dependencies"].keys() - for_contributors if f"[{extra}]" not in page
    ] == []
