"""A new image in one of QEMU's formats, written through a qemu-nbd of its own: the way of `qemu.py`, backwards.

qemu-img makes it empty, so what is never written stays unallocated and reads as zeros; no raw copy of it is ever on a
disk. The format is given to both programs and never probed. Giving the file its name is the business of the caller.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from thrave import programs
from thrave.volumes import inspection, libnbd
from thrave.volumes.chain import Arguments
from thrave.volumes.errors import UnknownFormatError, VolumeUnwritableError
from thrave.volumes.qemu import NbdServer, start_server

# format -> options of qemu-img create. Without force_size the size of a vpc image is rounded up to whole cylinders.
# vhdx is not among them: QEMU's driver refuses to write what does not begin and end at a multiple of 4 KiB.
_OPTIONS = {"qcow2": "lazy_refcounts=off", "vmdk": "subformat=monolithicSparse", "vpc": "force_size=on"}

_CREATE_TIMEOUT = 600.0  # seconds

WRITABLE_FORMATS = tuple(_OPTIONS)
"""QEMU's names of what can be written."""


class NewImage:
    """An image that is being filled."""

    def __init__(self, path: Path, binding: libnbd.Binding) -> None:
        self._path = path
        self._binding = binding
        self._handle: libnbd.Handle | None = binding.NBD()
        self._server: NbdServer | None = None

    def serve(self, image_format: str) -> None:
        """Start the server."""
        with self._calling() as handle:
            self._server = start_server(handle, Arguments([f"--format={image_format}", str(self._path)]))

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of the data, at most 32 MiB, at an offset in bytes; VolumeUnwritableError if that fails."""
        with self._calling() as handle:
            handle.pwrite(data, offset)

    def finish(self) -> None:
        """Have everything put on the disk, metadata too."""
        with self._calling() as handle:
            handle.flush()
            handle.shutdown()

    def close(self) -> None:
        """Drop the connection, which ends the server, and wait for its end. May be called again."""
        self._handle = None
        if self._server is not None:
            self._server.end()

    @contextmanager
    def _calling(self) -> Iterator[libnbd.Handle]:
        if self._handle is None:
            raise VolumeUnwritableError(self._path, "it is closed")
        try:
            yield self._handle
        except (self._binding.Error, TimeoutError, programs.ProgramError, OSError) as error:
            raise VolumeUnwritableError(self._path, str(error)) from error


@contextmanager
def new_image(path: Path, image_format: str, size: int) -> Iterator[NewImage]:
    """Make an image; it is whole and on the disk if the block ends well.

    Args:
        path: The file; it should be there, empty, with the mode that it is to have.
        image_format: One of `WRITABLE_FORMATS`.
        size: Bytes, as a guest sees them.

    Raises:
        UnknownFormatError: Of another format.
        ComponentMissingError: QEMU's programs or libnbd are not installed.
        VolumeUnwritableError: It cannot be made, or the disk is full.
    """
    path = path.absolute()
    image = NewImage(path, libnbd.load())
    _create(path, image_format, size)
    with closing(image):
        image.serve(image_format)
        yield image
        image.finish()


def _create(path: Path, image_format: str, size: int) -> None:
    if image_format not in WRITABLE_FORMATS:
        raise UnknownFormatError(image_format, WRITABLE_FORMATS)
    options = ["-q", "-f", image_format, "-o", _OPTIONS[image_format]]
    argv = [inspection.program("qemu-img"), "create", *options, str(path), str(size)]
    try:
        done = programs.run(argv, timeout=_CREATE_TIMEOUT, max_memory=programs.MAX_MEMORY)
    except programs.ProgramError as error:
        raise VolumeUnwritableError(path, str(error)) from error
    if done.status:
        raise VolumeUnwritableError(
            path, done.error_text.strip().removeprefix("qemu-img: ") or "qemu-img create failed"
        )
