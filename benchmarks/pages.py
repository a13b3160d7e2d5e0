"""Puts what was measured into a page of the docs, between two comments. What else stands on the page is left alone."""

from pathlib import Path

_END = "<!-- end of figures -->"


def put_figures(page: Path, program: str, figures: str) -> None:
    """Replace what stands between the comment that names the publishing `program` and the next one."""
    begin = f"<!-- figures: python benchmarks/{program} -->\n"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{begin}\n{figures}\n\n{_END}{after}")
