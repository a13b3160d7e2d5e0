"""The XML of a manifest: parses it into flat fields, and signs and verifies it. Nothing in it is trusted.

The signature is RSASSA-PKCS1-v1_5 with SHA-1 over two slices of the raw bytes, tags included, without a separator: the
first ``<machine_configuration>…</machine_configuration>`` and the first ``<image>…</image>`` (ec2-ami-tools 1.3 to
1.5.3, Walrus, euca2ools; version 3 signs only the second). Of a certificate only the public key is used: like every
known verifier, this one ignores dates and issuer. The meaning of the fields is in `thrave.bundle.manifest`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.parsers import expat

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.x509 import Certificate

from thrave.bundle.errors import ManifestError, SignatureError


class Slice(NamedTuple):
    """A section of the manifest: offsets of its first byte and of its closing tag."""

    start: int
    closing_tag: int


def find_slice(xml: bytes, tag: str) -> Slice | None:
    """Return where the first ``<tag>`` in the bytes begins, and the first ``</tag>`` after it."""
    start = xml.find(f"<{tag}>".encode())
    closing_tag = xml.find(f"</{tag}>".encode(), start)
    return Slice(start, closing_tag) if 0 <= start < closing_tag else None


def signed_bytes(xml: bytes) -> bytes:
    """Return the bytes that the signature of a manifest covers."""
    return b"".join(_cut(xml, tag) for tag in ("machine_configuration", "image"))


def sign(xml: bytes, signing_key: RSAPrivateKey) -> bytes:
    """Return the signature of a manifest; its bytes after the image may still be missing."""
    return signing_key.sign(signed_bytes(xml), PKCS1v15(), SHA1())  # noqa: S303 - required by the format


def is_signed_with(xml: bytes, signature: bytes, key: RSAPublicKey) -> bool:
    """Whether the signature of these bytes was made with the private half of this key."""
    try:
        key.verify(signature, signed_bytes(xml), PKCS1v15(), SHA1())  # noqa: S303 - required by the format
    except InvalidSignature:
        return False
    return True


def verify_signature(xml: bytes, signature: bytes, certificate: Certificate) -> None:
    """Verify the signature of a manifest.

    Raises:
        SignatureError: It is missing, or was not made with the key of the certificate over these bytes.
    """
    if not signature:
        raise SignatureError("the manifest is not signed, but a signer's certificate was given")
    if not is_signed_with(xml, signature, rsa_key(certificate)):
        raise SignatureError("the manifest was changed, or another key than this certificate's signed it")


def rsa_key(certificate: Certificate) -> RSAPublicKey:
    """Return the public key of the certificate.

    Raises:
        ValueError: Not an RSA key, which the format requires.
    """
    key = certificate.public_key()
    if not isinstance(key, RSAPublicKey):
        raise ValueError("the certificate holds no RSA key")  # noqa: TRY004 - the value's content is wrong
    return key


def _cut(xml: bytes, tag: str) -> bytes:
    found = find_slice(xml, tag)
    return xml[found.start : found.closing_tag + len(tag) + len("</>")] if found else b""


MAX_MANIFEST_BYTES = 32 * 1024 * 1024
"""Maximum size of a manifest, enough for 2 TiB. Eucalyptus 4.4 accepts 5 MiB, enough for 370 GiB."""


_MAX_DEPTH = 8


_MAX_MARKUP = 64 * 1024
"""Bytes from one ``<`` to the next: no tag and no text of a known bundler is longer than the 4 KiB of a hex key."""


_MAX_ATTRIBUTES = 16  # of one element; known elements have at most one


_MAX_UNKNOWN = 1000  # elements


_MAX_LIST_ENTRIES = 1000  # block devices, product codes or ancestors


_SIGNED = ("machine_configuration", "image")


_LEAVES = frozenset({
    "version", "signature",
    "bundler/name", "bundler/version", "bundler/release",
    "machine_configuration/architecture", "machine_configuration/kernel_id", "machine_configuration/ramdisk_id",
    "image/name", "image/user", "image/type", "image/kernel_name", "image/digest", "image/size", "image/bundled_size",
    "image/ec2_encrypted_key", "image/user_encrypted_key", "image/ec2_encrypted_iv", "image/user_encrypted_iv",
})  # fmt: skip
"""Elements that may occur once and contain text."""


_BRANCHES = frozenset({
    "", "bundler", "machine_configuration", "machine_configuration/block_device_mapping",
    "machine_configuration/product_codes", "image", "image/ancestry", "image/parts",
})  # fmt: skip
"""Elements that may occur once and contain elements; the path of the root is empty."""


_PART = "image/parts/part"


_ROWS: Mapping[str, Sequence[str]] = {
    "machine_configuration/block_device_mapping/mapping": ("virtual", "device"),
    _PART: ("@index", "filename", "digest", "digest@algorithm"),
}
"""Elements that may be repeated, with their columns: child elements, or attributes (``@``) of those."""


_LISTS = frozenset({"machine_configuration/product_codes/product_code", "image/ancestry/ancestor_ami_id"})
"""Elements that may be repeated and contain text."""


_ATTRIBUTES = frozenset({
    "image/digest@algorithm", "image/parts@count",
    "image/ec2_encrypted_key@algorithm", "image/user_encrypted_key@algorithm",
})  # fmt: skip


_KNOWN = _LEAVES | _BRANCHES | _LISTS | _ROWS.keys() | {f"{path}/{tag}" for path in _ROWS for tag in _ROWS[path]}


# Expat's error codes for a truncated document.
_TRUNCATED = frozenset(
    expat.errors.codes[text]
    for text in (
        expat.errors.XML_ERROR_NO_ELEMENTS,
        expat.errors.XML_ERROR_UNCLOSED_TOKEN,
        expat.errors.XML_ERROR_PARTIAL_CHAR,
        expat.errors.XML_ERROR_UNCLOSED_CDATA_SECTION,
    )
)


Row = tuple[str, ...]
"""The columns of a repeated element, in the order of `_ROWS`; empty where an attribute is missing."""


@dataclass
class Fields:
    """The text of a manifest by path below ``<manifest>``, such as ``image/size``.

    Attributes:
        text: Of elements that may occur once, stripped.
        attributes: Of the same elements, by ``path@name``.
        lists: Of elements that may be repeated.
        rows: Of repeated elements with child elements.
    """

    text: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)


def read_fields(xml: bytes) -> Fields:
    """Parse a manifest with Expat into fields.

    Unknown elements and attributes are skipped, so that a manifest needs only a few times its size in memory. The two
    signed elements must be exactly at the slices that the signature covers, so that the verifier and the reader use
    the same image.

    Raises:
        ManifestError: Too large, not XML, not a manifest, truncated, with a document type or a repeated element, beyond
            a limit, or with signed elements at another position.
    """
    if len(xml) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"the manifest has {len(xml)} bytes, more than {MAX_MANIFEST_BYTES}")
    _check_markup(xml)
    reader = _Reader(xml)
    try:
        reader.parse()
    except expat.ExpatError as error:
        raise _parse_error(error, xml) from None
    except (LookupError, ValueError) as error:  # of the codec that the XML declaration names
        raise ManifestError(f"the manifest declares an encoding that cannot be read: {str(error)!a}") from None
    return reader.fields


def _check_markup(xml: bytes) -> None:
    """Refuse long tags and texts before Expat creates objects for them.

    Attribute values contain no ``<``, so a tag ends before the next one.
    """
    if b"\0" in xml:  # also in UTF-16, where the signed elements could not be found
        raise ManifestError("the manifest is not well-formed XML in an encoding of single bytes or UTF-8: it has NULs")
    at = 0
    while len(xml) - at > _MAX_MARKUP:
        at = xml.rfind(b"<", at + 1, at + 1 + _MAX_MARKUP)
        if at < 0:
            raise ManifestError(f"the manifest has a tag or a text of more than {_MAX_MARKUP} bytes")


def _parse_error(error: expat.ExpatError, xml: bytes) -> ManifestError:
    if not xml.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        message = (
            f"this is not a manifest: its {len(xml)} bytes are not XML"
            if xml
            else "the manifest is truncated: it is empty"
        )
        return ManifestError(message)
    if error.code in _TRUNCATED and not xml.rstrip().endswith(b"</manifest>"):
        return ManifestError(f"the manifest is truncated: it ends after {len(xml)} bytes without </manifest>")
    return ManifestError(f"the manifest is not well-formed XML: {error}")


class _Reader:
    """Expat's handlers for one document."""

    def __init__(self, xml: bytes) -> None:
        self.fields = Fields()
        self._xml = xml
        self._slices = {tag: find_slice(xml, tag) for tag in _SIGNED}
        self._seen: set[str] = set()
        self._path: list[str] = []  # of each open element that is known
        self._unknown_depth = 0  # open elements below the last known one
        self._unknown = 0
        self._text: list[str] = []
        self._text_length = 0
        self._row: dict[str, str] = {}
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._add_text

    def parse(self) -> None:
        self._parser.Parse(self._xml, True)  # noqa: FBT003 - expat's own signature
        for tag, where in self._slices.items():
            if where is not None and tag not in self._seen:
                raise ManifestError(f"the text <{tag}> is in the manifest, but not as its element")

    @staticmethod
    def _refuse_doctype(*_: object) -> None:
        raise ManifestError("the manifest declares a document type, which is not allowed")

    def _add_text(self, text: str) -> None:
        self._text_length += len(text)
        if self._text_length > _MAX_MARKUP:
            raise ManifestError(f"an element of the manifest has a text of more than {_MAX_MARKUP} characters")
        self._text.append(text)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(attributes) > _MAX_ATTRIBUTES:
            raise ManifestError(f"<{tag[:40]}> in the manifest has {len(attributes)} attributes")
        self._text.clear()
        self._text_length = 0
        if not self._path:
            if tag != "manifest":
                raise ManifestError(f"the document is a <{tag[:40]}>, not a <manifest>")
            self._path.append("")
            return
        path = f"{self._path[-1]}/{tag}" if self._path[-1] else tag
        if self._unknown_depth or path not in _KNOWN:
            self._skip(tag)
            return
        if path in self._slices:
            self._check_edge(path, 0)
        self._begin(path, tag, attributes)
        self._path.append(path)

    def _skip(self, tag: str) -> None:
        self._unknown_depth += 1
        self._unknown += 1
        if len(self._path) + self._unknown_depth > _MAX_DEPTH:
            raise ManifestError("the manifest's elements are nested too deeply")
        if self._unknown > _MAX_UNKNOWN:
            raise ManifestError(f"the manifest has more than {_MAX_UNKNOWN} unknown elements, the last a <{tag[:40]}>")

    def _begin(self, path: str, tag: str, attributes: dict[str, str]) -> None:
        if path in _ROWS:
            self._row = {}
            tag = ""
        elif self._path[-1] in _ROWS:
            if tag in self._row:
                raise ManifestError(f"<{tag}> occurs twice in one element of the manifest")
        elif path not in _LISTS:
            if path in self._seen:
                raise ManifestError(f"<{path}> occurs twice in the manifest")
            self._seen.add(path)
            self._keep_attributes(self.fields.attributes, path, attributes, _ATTRIBUTES)
            return
        self._keep_attributes(self._row, tag, attributes, _ROWS.get(path) or _ROWS.get(self._path[-1], ()))

    @staticmethod
    def _keep_attributes(
        kept: dict[str, str], owner: str, attributes: dict[str, str], known: frozenset[str] | Sequence[str]
    ) -> None:
        for name, value in attributes.items():
            if f"{owner}@{name}" in known:
                kept[f"{owner}@{name}"] = value

    def _end(self, tag: str) -> None:
        if self._unknown_depth:
            self._unknown_depth -= 1
            self._text.clear()
            return
        path = self._path.pop()
        if path in self._slices:
            self._check_edge(path, 1)
        if path in _LEAVES:
            self.fields.text[path] = self._whole_text()
        elif path in _LISTS:
            self.fields.lists.setdefault(path, []).append(self._whole_text())
            self._count_listed(path, len(self.fields.lists[path]))
        elif path in _ROWS:
            for column in _ROWS[path]:
                if column not in self._row and column != "digest@algorithm":
                    raise ManifestError(f"a <{path}> in the manifest has no <{column.lstrip('@')}>")
            self.fields.rows.setdefault(path, []).append(tuple(self._row.get(column, "") for column in _ROWS[path]))
            if path != _PART:  # the number of parts is limited by the size of the manifest
                self._count_listed(path, len(self.fields.rows[path]))
        elif self._path and self._path[-1] in _ROWS:
            self._row[tag] = self._whole_text()
        self._text.clear()

    @staticmethod
    def _count_listed(path: str, count: int) -> None:
        if count > _MAX_LIST_ENTRIES:
            raise ManifestError(f"the manifest has more than {_MAX_LIST_ENTRIES} <{path}>")

    def _whole_text(self) -> str:
        return "".join(self._text).strip()

    def _check_edge(self, tag: str, edge: int) -> None:
        where = self._slices[tag]
        # An element that is not closed has no slice. Expat reports that at the end of the document.
        is_right = edge == 0 if where is None else where[edge] == self._parser.CurrentByteIndex
        if not is_right:
            raise ManifestError(f"the first <{tag}> in the manifest's text is not its element")
