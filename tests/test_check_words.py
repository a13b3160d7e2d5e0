"""scripts/check_words.py, which `make check` runs."""

import runpy
import tomllib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
find_words = runpy.run_path(str(SCRIPTS / "check_words.py"))["find_words"]
REPLACEMENTS = {"look(s|ed)? after": "monitor", "house": "code base"}


@pytest.mark.parametrize(
    "text", ["looked after", "Looks after", "look_after_until", "LookAfter", "# look\n    # after"]
)
def test_find_words_finds_phrase_in_text_names_and_over_line_ends(text):
    assert [instead for _, _, instead in find_words(text, REPLACEMENTS)] == ["monitor"]


@pytest.mark.parametrize("text", ["housekeeping", "warehouse", "look afterwards", "overlook after"])
def test_find_words_ignores_parts_of_words(text):
    assert list(find_words(text, REPLACEMENTS)) == []


def test_find_words_returns_line_of_first_word():
    assert list(find_words("one\n\nThe house\n", REPLACEMENTS)) == [(3, "house", "code base")]


def test_no_path_of_the_word_list_is_both_checked_and_unchecked():
    word_list = tomllib.loads((SCRIPTS / "plain_words.toml").read_text())
    assert set(word_list["checked"]).isdisjoint(word_list["unchecked"])
