"""The page of stores has the current checks of the doctor."""

from pathlib import Path

from thrave.doctor.check_table import CHECKS, CLEAN_UP

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "stores.md"


def test_page_has_line_for_each_store_check_and_column_for_each_store():
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == [
        check.name for check in (*CHECKS, CLEAN_UP) if check.area == "store"
    ]
    assert {len(line) for line in lines} == {6}
