"""Enciphers a stream and cuts the ciphertext into hashed parts.

The one strictly serial stage of sealing, since in CBC each block needs the one before. The ciphertext is written
straight into the part's own buffer and hashed while it is still in the processor's cache; it goes nowhere from here.
"""

import hashlib
from collections.abc import Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from thrave.bundle.names import part_filename
from thrave.bundle.sealed import Part
from thrave.bundle.secrets import BundleSecrets

CIPHER_BLOCK = 16


class PartCutter:
    """AES-128-CBC with PKCS#7 padding over everything that is added, in parts of one size.

    Args:
        secrets: key and IV of this one stream.
        prefix: stem of the parts' names.
        width: digits of their numbers.
        part_size: bytes of each part but the last, a multiple of 16.
        first: number of the first part; the IV is then the last block of the one before.
        series: digits before the number; see ``names.new_series``.
    """

    def __init__(
        self, secrets: BundleSecrets, prefix: str, width: int, part_size: int, *, first: int = 0, series: str = ""
    ) -> None:
        self._encryptor = Cipher(algorithms.AES(secrets.key), modes.CBC(secrets.iv)).encryptor()
        self._prefix, self._width, self._part_size, self._series = prefix, width, part_size, series
        self._index = first
        self._taken = first * part_size
        self._begin_part()

    @property
    def taken(self) -> int:
        """Bytes of the stream that were added, those in the parts before the first one included."""
        return self._taken

    def add(self, data: bytes | memoryview) -> Iterator[Part]:
        """Encipher more of the stream; yield each part that it fills."""
        view = memoryview(data)
        while view:
            room = self._part_size - self._filled
            yield from self._encipher(view[:room])
            view = view[room:]

    def finish(self) -> Iterator[Part]:
        """Pad and encipher the rest; yield the last part. No part is ever empty: padding is at least one byte."""
        padding = CIPHER_BLOCK - self._taken % CIPHER_BLOCK
        yield from self._encipher(memoryview(bytes([padding]) * padding))
        if self._filled:
            yield self._cut()

    def _encipher(self, data: memoryview) -> Iterator[Part]:
        # The cipher holds back an incomplete block, so what fits as input fits as output, too.
        written = self._encryptor.update_into(data, self._buffer[self._filled :])
        fresh = self._buffer[self._filled : self._filled + written]
        self._sha1.update(fresh)
        self._sha256.update(fresh)
        self._taken += len(data)
        self._filled += written
        if self._filled == self._part_size:
            yield self._cut()

    def _cut(self) -> Part:
        part = Part(
            index=self._index,
            filename=part_filename(self._prefix, self._index, self._width, self._series),
            size=self._filled,
            sha1=self._sha1.hexdigest(),
            sha256=self._sha256.hexdigest(),
            data=self._buffer[: self._filled].toreadonly(),
        )
        self._index += 1
        self._begin_part()
        return part

    def _begin_part(self) -> None:
        # update_into asks for room for one block more than it writes.
        self._buffer = memoryview(bytearray(self._part_size + CIPHER_BLOCK))
        self._filled = 0
        self._sha1 = hashlib.sha1(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
