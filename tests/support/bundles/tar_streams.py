"""Makes tar archives with Python's tarfile, and reads them with `image_runs`."""

import io
import tarfile

from thrave.bundle.tar_reader import image_runs


def read_tar(data: bytes, size: int, piece_size: int = 1 << 20) -> bytes:
    """Return the image in a tar stream that arrives in pieces of `piece_size` bytes."""
    image = bytearray(size)
    for offset, run in image_runs((data[i : i + piece_size] for i in range(0, len(data), piece_size)), size):
        image[offset : offset + len(run)] = run
    return bytes(image)


def tar_of(data: bytes, **attributes: object) -> bytes:
    """Return an archive of one member with these attributes of `TarInfo`."""
    member = tarfile.TarInfo("disk")
    member.size = len(data)
    tar_format = attributes.pop("format", tarfile.GNU_FORMAT)
    for name, value in attributes.items():
        setattr(member, name, value)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def with_checksum(header: bytes) -> bytes:
    """Return the header with the correct checksum."""
    blank = header[:148] + b" " * 8 + header[156:512]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def with_field(data: bytes, start: int, value: bytes) -> bytes:
    """Return the archive with other bytes at `start` of its first header, and the correct checksum."""
    return with_checksum(data[:start] + value + data[start + len(value) :])


def blocks_of(data: bytes) -> list[bytes]:
    """Return the blocks of an archive, 512 bytes each."""
    return [data[at : at + 512] for at in range(0, len(data), 512)]
