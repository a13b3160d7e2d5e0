"""Turns a manifest's XML into flat fields, trusting nothing in it.

Expat does the parsing; declarations of documents and entities are refused before they can do anything, nesting and
size have bounds, and an element that says something twice is refused rather than guessed at. The two signed elements
must lie exactly where the signature's slices lie, so that nobody can show the verifier one image and the reader
another. What the fields mean is the business of ``reading.py``.
"""

from dataclasses import dataclass, field
from xml.parsers import expat

from thrave.bundle.errors import ManifestError
from thrave.bundle.signatures import find_slice

MOST_BYTES = 32 * 1024 * 1024
"""Eucalyptus 4.4 takes 5 MiB, which is the parts of 370 GiB; this is enough for those of 2 TiB."""

_DEEPEST = 8
_SIGNED = ("machine_configuration", "image")
_REPEATED = {
    "machine_configuration/block_device_mapping/mapping": ("virtual", "device"),
    "image/parts/part": ("filename", "digest"),
}
"""Elements of which there are many, and what stands in each; the index of a part is an attribute."""

_REPEATED_LEAVES = frozenset(
    {"machine_configuration/product_codes/product_code", "image/ancestry/ancestor_ami_id"},
)


@dataclass
class Fields:
    """A manifest's text by path below ``<manifest>``, ``image/size`` for instance.

    Attributes:
        text: of elements that stand once, stripped.
        attributes: of the same, by ``path@name``.
        lists: of elements that may be repeated.
        rows: of the repeated elements that have elements themselves; their attributes by name, those of the
            elements in them by ``element@name``.
    """

    text: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def read_fields(xml: bytes) -> Fields:
    """Return what a manifest says.

    Raises:
        ManifestError: it is too large, no XML, no manifest, declares a document type, repeats an element, or hides
            what is signed.
    """
    if len(xml) > MOST_BYTES:
        raise ManifestError(f"the manifest has {len(xml)} bytes, more than {MOST_BYTES}")
    reader = _Reader(xml)
    try:
        reader.parse()
    except expat.ExpatError as error:
        raise ManifestError(f"the manifest is not well-formed XML: {error}") from None
    except (LookupError, ValueError) as error:  # from the codec that its XML declaration names
        raise ManifestError(f"the manifest declares an encoding that cannot be read: {str(error)!a}") from None
    return reader.fields


class _Reader:
    """Expat's handlers for one document."""

    def __init__(self, xml: bytes) -> None:
        self.fields = Fields()
        self._xml = xml
        self._slices = {tag: find_slice(xml, tag) for tag in _SIGNED}
        self._seen: set[str] = set()
        self._path: list[str] = []
        self._text: list[str] = []
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text.append

    def parse(self) -> None:
        self._parser.Parse(self._xml, True)  # noqa: FBT003 - expat's own signature
        for tag, where in self._slices.items():
            if where is not None and tag not in self._seen:
                raise ManifestError(f"the text <{tag}> stands in the manifest, but not as its element")

    @staticmethod
    def _refuse_doctype(*_: object) -> None:
        raise ManifestError("the manifest declares a document type, which none does")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._path and tag != "manifest":
            raise ManifestError(f"the document is a <{tag}>, not a <manifest>")
        if len(self._path) >= _DEEPEST:
            raise ManifestError("the manifest's elements are nested too deeply")
        self._path.append(tag)
        self._text.clear()
        path = self._here()
        if path in self._slices:
            self._check_edge(path, 0)
        if path in _REPEATED:
            self.fields.rows.setdefault(path, []).append(dict(attributes))
        elif (row := self._row()) is not None:
            row.update({f"{tag}@{name}": value for name, value in attributes.items()})
        elif path not in _REPEATED_LEAVES:
            self._note_once(path, attributes)

    def _note_once(self, path: str, attributes: dict[str, str]) -> None:
        if path in self._seen:
            raise ManifestError(f"<{path}> stands twice in the manifest")
        self._seen.add(path)
        self.fields.attributes.update({f"{path}@{name}": value for name, value in attributes.items()})

    def _end(self, tag: str) -> None:
        path, text, row = self._here(), "".join(self._text).strip(), self._row()
        self._text.clear()
        self._path.pop()
        if path in self._slices:
            self._check_edge(path, 1)
        if path in _REPEATED_LEAVES:
            self.fields.lists.setdefault(path, []).append(text)
        elif row is None:
            self.fields.text[path] = text
        elif row.setdefault(tag, text) is not text:
            raise ManifestError(f"<{tag}> stands twice in one element of the manifest")

    def _check_edge(self, tag: str, edge: int) -> None:
        where = self._slices[tag]
        if where is None or where[edge] != self._parser.CurrentByteIndex:
            raise ManifestError(f"the first <{tag}> in the manifest's text is not its element")

    def _here(self) -> str:
        return "/".join(self._path[1:])

    def _row(self) -> dict[str, str] | None:
        """The row that the current element stands in, if it is a column of one."""
        above = "/".join(self._path[1:-1])
        return self.fields.rows[above][-1] if self._path[-1] in _REPEATED.get(above, ()) else None
