"""Checks that files do not use the words of `plain_words.toml`; prints each place with what to write instead.

Without arguments it checks the paths that `plain_words.toml` lists. With arguments it checks these files or folders.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORD_LIST = ROOT / "scripts" / "plain_words.toml"
SUFFIXES = {".md", ".py", ".toml", ".service", ".conf", ".rules"}
CASE_CHANGE = re.compile(r"(?<=[a-z])(?=[A-Z])")
# Between two words of a phrase: a line end with the next line's comment or list mark, or the underscore of a name.
SEPARATOR = r"(?:\s+(?:[#>*-]+\s+)?|[_-])"


def find_words(text: str, replacements: Mapping[str, str]) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, words found, what to write instead) for each unwanted word or phrase in `text`.

    Args:
        text: Any text or source code.
        replacements: Regular expression of the words, in which a blank matches any separator, to the replacement.
            The expression matches whole words only, in any letter case, also in names (`look_after`, `LookAfter`).
    """
    text = CASE_CHANGE.sub(" ", text)
    for words, instead in replacements.items():
        pattern = rf"(?<![a-z])(?:{words.replace(' ', SEPARATOR)})(?![a-z])"
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def find_files(path: Path) -> Iterator[Path]:
    """Yield the text files of a folder, or the file itself."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    else:
        raise SystemExit(f"{path}: no such file or folder; correct `checked` in {WORD_LIST.relative_to(ROOT)}")


def main(arguments: list[str]) -> int:
    """Check the files, print what was found, and return the exit code."""
    word_list = tomllib.loads(WORD_LIST.read_text())
    paths = [Path(argument).resolve() for argument in arguments] or [ROOT / path for path in word_list["checked"]]
    unchecked = {ROOT / path for path in word_list["unchecked"]}
    count = 0
    for file in (file for path in paths for file in find_files(path) if file not in unchecked):
        for line, words, instead in sorted(find_words(file.read_text(), word_list["instead"])):
            count += 1
            print(f"{file.relative_to(ROOT)}:{line}: '{words}': write {instead}", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
