"""Makes tar streams and reads them with our reader."""

import io
import tarfile

from thrave.bundle.tar_reader import image_runs


def read_tar(data: bytes, size: int, bite: int = 1 << 20) -> bytes:
    """The image in a tar stream that comes in bites."""
    image = bytearray(size)
    for offset, run in image_runs((data[i : i + bite] for i in range(0, len(data), bite)), size):
        image[offset : offset + len(run)] = run
    return bytes(image)


def tar_of(data: bytes, **attributes: object) -> bytes:
    """An archive of one member."""
    member = tarfile.TarInfo("disk")
    member.size = len(data)
    form = attributes.pop("format", tarfile.GNU_FORMAT)
    for name, value in attributes.items():
        setattr(member, name, value)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def resummed(header: bytes) -> bytes:
    """The header with the checksum that it should have."""
    blank = header[:148] + b" " * 8 + header[156:512]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def with_field(data: bytes, start: int, value: bytes) -> bytes:
    """The archive with something else in its first header."""
    return resummed(data[:start] + value + data[start + len(value) :])


def blocks_of(data: bytes) -> list[bytes]:
    """The blocks of an archive."""
    return [data[at : at + 512] for at in range(0, len(data), 512)]
