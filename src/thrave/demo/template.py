"""NTFS volumes without their files' contents: what mkntfs and ntfs-3g wrote, kept as package data.

A template is one xz stream: a line of JSON, then the bytes of the file system itself (boot sectors, MFT, bitmap,
log, folders), run after run. Templates are made by scripts/make_demo_templates.py, once, and read here; nothing is
mounted and no tool is needed.
"""

import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import IO, NamedTuple

from thrave.demo.content import Kind


class Run(NamedTuple):
    """Bytes that stand together; the offset counts from the volume's beginning."""

    offset: int
    length: int


@dataclass(frozen=True)
class TemplateFile:
    """A file of the volume whose content is to be filled in.

    Attributes:
        path: From the volume's root, with slashes.
        kind: What its content looks like.
        size: Bytes; the last run may be longer, up to a whole cluster.
        deleted: Whether it was deleted: its record and its clusters are free, and hold what they held.
        runs: Where its content lies, in the order of the file.
    """

    path: str
    kind: Kind
    size: int
    deleted: bool
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Template:
    """A volume of `size` bytes: its files, and where the file system's own bytes stand."""

    size: int
    metadata: tuple[Run, ...]
    files: tuple[TemplateFile, ...]

    def document(self) -> dict[str, object]:
        """As it is written into the stream's first line."""
        rows = [[file.path, file.kind, file.size, file.deleted, file.runs] for file in self.files]
        return {"size": self.size, "metadata": self.metadata, "files": rows}


class TemplateReader:
    """A template's stream while it is read: first `template`, then its bytes in the order of `template.metadata`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        document = json.loads(stream.readline())
        self.template = Template(
            document["size"],
            _runs(document["metadata"]),
            tuple(
                TemplateFile(path, kind, size, deleted, _runs(runs))
                for path, kind, size, deleted, runs in document["files"]
            ),
        )

    def metadata(self) -> Iterator[tuple[Run, bytes]]:
        """Each run of the file system's own bytes; once."""
        for run in self.template.metadata:
            yield run, self._stream.read(run.length)


@contextmanager
def open_template(name: str) -> Iterator[TemplateReader]:
    """Open one of the package's templates by its file name."""
    with files("thrave.demo").joinpath("templates", name).open("rb") as packed, lzma.open(packed) as stream:
        yield TemplateReader(stream)


def _runs(pairs: Sequence[Sequence[int]]) -> tuple[Run, ...]:
    return tuple(Run(offset, length) for offset, length in pairs)
