"""Debian's libnbd binding, found also from a virtual environment, with types for the little that is used of it.

libnbd is on no Python package index; Debian's python3-libnbd puts it where only the system's Python looks. It is loaded
from there by its full path: that folder holds much else and is never put on ``sys.path``.

A volume in one of QEMU's formats, served by qemu-nbd and read through libnbd.

qemu-nbd is the reference implementation of these formats. It is started by socket activation (sd_listen_fds(3)): the
socket is connected before the server runs, in a private folder, so nobody else can come in between. The server is
read-only, is told the format, takes one client, and ends when that client's connection does: with close(), and also
when this process is killed. No port, daemon or kernel module is used.

A new image in one of QEMU's formats, written through a qemu-nbd of its own: the way of `qemu.py`, backwards.

qemu-img makes it empty, so what is never written stays unallocated and reads as zeros; no raw copy of it is ever on a
disk. The format is given to both programs and never probed. Giving the file its name is the business of the caller.
"""

import math
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from thrave import programs
from thrave.concurrency import monotonic
from thrave.programs import Program
from thrave.volumes import image_chain
from thrave.volumes.base import Extent, Interruption, merge_extents
from thrave.volumes.errors import (
    ToolNotInstalled,
    UnknownFormatError,
    VolumeError,
    VolumeUnreadableError,
    VolumeUnwritableError,
)
from thrave.volumes.image_chain import Arguments, Inspection, check_size, program

_DEBIAN_MODULES = "/usr/lib/python3/dist-packages"


_PACKAGE = "python3-libnbd"


ExtentCallback = Callable[[str, int, list[int], object], object]
"""Called with context, offset in bytes, [length, flags, length, flags, …], error."""


class Handle(Protocol):
    """What is used of ``nbd.NBD``, libnbd(3). One handle may be used from several threads; it works one at a time."""

    def add_meta_context(self, name: str) -> None:
        """Ask for a metadata context, before connecting."""

    def aio_connect_socket(self, sock: int) -> None:
        """Begin the handshake on a connected socket; the descriptor is closed with this handle."""

    def aio_is_ready(self) -> bool:
        """Whether the handshake is done."""

    def poll(self, timeout: int) -> int:
        """Move the handshake on; 0 if nothing happened for `timeout` milliseconds."""

    def get_size(self) -> int:
        """Size of the export, in bytes."""

    def block_status(self, count: int, offset: int, extent: ExtentCallback) -> None:
        """Report runs from `offset` on, of about `count` bytes, possibly less."""

    def pread(self, count: int, offset: int) -> bytearray:
        """Read all or nothing."""

    def pwrite(self, buf: memoryview, offset: int) -> None:
        """Write all or nothing."""

    def flush(self) -> None:
        """Have the server put what was written on the disk."""

    def shutdown(self) -> None:
        """Say good-bye to the server."""


class NbdBinding(Protocol):
    """The module ``nbd``."""

    @property
    def NBD(self) -> Callable[[], Handle]:  # noqa: N802 (libnbd's name)
        """Makes a handle."""

    @property
    def Error(self) -> type[Exception]:  # noqa: N802 (libnbd's name)
        """What every call raises."""


def load() -> NbdBinding:
    """The binding, wherever it is installed.

    Raises:
        ComponentMissingError: It is not, or it was built for another Python.
    """
    try:
        return cast("NbdBinding", import_module("nbd"))
    except ImportError:
        _load_from_debian("libnbdmod")
        return cast("NbdBinding", _load_from_debian("nbd"))


def _load_from_debian(name: str) -> ModuleType:
    spec = PathFinder.find_spec(name, [_DEBIAN_MODULES])
    if spec is None or spec.loader is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ToolNotInstalled(f"libnbd for Python {version}", _PACKAGE)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


ALLOCATION = "base:allocation"


READS_AS_ZEROS = 2  # NBD_STATE_ZERO; NBD_STATE_HOLE (1) alone promises nothing of the content (NBD protocol)


START_SECONDS = 30.0


_END_TIMEOUT = 30.0  # seconds for a server to end once its connection is dropped


_POLL_MILLISECONDS = 200


_MOST_READ = 16 << 20  # bytes in one NBD read; servers may refuse more than 32 MiB (NBD protocol, "maximum payload")


_BLOCK = 4096  # reads begin and end at multiples of this; some formats (vhdx) refuse any that do not


_MOST_STATUS = 2 << 30  # bytes in one question for extents; a length has 32 bits


class NbdServer:
    """A running qemu-nbd with one client."""

    def __init__(self, program: Program, connection: socket.socket) -> None:
        """Take over both; `connection` is a second descriptor of the client's connection."""
        self._program = program
        self._connection = connection

    def kill(self) -> None:
        """Drop the connection and kill the server, also from another thread while it is being asked."""
        with suppress(OSError):  # it was dropped before
            self._connection.shutdown(socket.SHUT_RDWR)
        self._program.kill()

    def end(self) -> None:
        """Drop the connection and wait until the server has ended; one that does not end is killed.

        The socket itself is shut down: libnbd closes it only when its handle is freed, and the traceback of an error
        that is on its way up still holds that handle.
        """
        with suppress(OSError):  # the server was quicker, or this is the second time
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            self._program.poll(_END_TIMEOUT)
        finally:
            self._program.kill()


class QemuVolume:
    """Reads an image through a qemu-nbd of its own.

    Args:
        inspection: The image, looked at; it stays open for as long as this is, and its owner closes it.
        secret_file: Holds the passphrase of the images that are encrypted.

    Raises:
        VolumeError: QEMU finds the image damaged, a component is missing, the server does not come up within
            START_SECONDS, or serves another size than the image states.
    """

    def __init__(self, inspection: Inspection, secret_file: Path | None = None) -> None:
        self._path = inspection.layers[0].path
        self._binding = load()
        secret = inspection.check(secret_file)
        self._handle: Handle | None
        arguments = image_chain.arguments(inspection.layers, secret)
        self._handle, self._server = self._connect(arguments, inspection.interruption)
        self._size = self._handle.get_size()
        try:
            check_size(inspection.layers[0], self._size)
        except VolumeError:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes, as the guest sees it."""
        return self._size

    def extents(self) -> list[Extent]:
        """What base:allocation does not call zeros; QEMU 7.2 knows no holes of vhdx."""
        try:
            return merge_extents(
                [(offset, length) for offset, length, flags in self._statuses() if not flags & READS_AS_ZEROS]
            )
        except self._binding.Error as error:
            raise VolumeUnreadableError(self._path, f"no extents: {error}") from error

    def will_read(self, offset: int, length: int) -> None:
        """Do nothing: one connection answers one question after the other."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` by reads of at most 16 MiB."""
        for start in range(0, len(buffer), _MOST_READ):
            chunk = buffer[start : start + _MOST_READ]
            try:
                chunk[:] = self._read(offset + start, len(chunk))
            except self._binding.Error as error:
                # QEMU 7.2 drops the connection for a failed read, so the binding's words alone would mislead.
                why = f"qemu-nbd cannot read it: the image, or the disk below it, is damaged ({error})"
                raise VolumeUnreadableError(self._path, why, offset=offset + start) from error

    def close(self) -> None:
        """Drop the connection, which ends the server, and wait for its end."""
        self._handle = None
        self._server.end()

    def _opened(self) -> Handle:
        if self._handle is None:
            raise VolumeUnreadableError(self._path, "it is closed")
        return self._handle

    def _read(self, offset: int, length: int) -> memoryview:
        first, end = offset - offset % _BLOCK, offset + length
        last = min(end + -end % _BLOCK, max(end, self._size))
        whole = memoryview(self._opened().pread(last - first, first))
        return whole[offset - first : end - first]

    def _connect(self, image: Arguments, interruption: Interruption) -> tuple[Handle, NbdServer]:
        handle = self._binding.NBD()
        handle.add_meta_context(ALLOCATION)
        try:
            image = Arguments(["--read-only", *image.words], image.descriptors)
            server = start_server(handle, image, interruption)
        except (self._binding.Error, TimeoutError, programs.ProgramError, OSError) as error:
            raise VolumeUnreadableError(self._path, f"qemu-nbd does not serve it ({error})") from error
        interruption.add(server.kill)
        return handle, server

    def _statuses(self) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) of the whole volume, in order; a server that does not move on is an error."""
        offset = 0
        while offset < self._size:
            for length, flags in self._status(offset):
                length_within = min(length, self._size - offset)
                yield offset, length_within, flags
                offset += length_within

    def _status(self, offset: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def note(context: str, start: int, entries: list[int], _error: object) -> None:
            if context == ALLOCATION and start == offset:
                found.extend(zip(entries[::2], entries[1::2], strict=True))

        self._opened().block_status(min(_MOST_STATUS, self._size - offset), offset, note)
        if not any(length for length, _ in found):
            raise VolumeUnreadableError(self._path, "no extents from here on", offset=offset)
        return found


def start_server(handle: Handle, image: Arguments, interruption: Interruption | None = None) -> NbdServer:
    """Connect a new handle to a qemu-nbd of its own.

    Args:
        handle: Not yet connected.
        image: Options, and the image (`chain.arguments`).
        interruption: Ends the waiting for it.

    Returns:
        The server; the caller ends it.

    Raises:
        ComponentMissingError: qemu-nbd is not installed.
        ProgramError: It cannot be started.
        OSError: No socket can be made.
        TimeoutError: It did not answer within START_SECONDS, or nobody waits for it any more.
        Exception: The binding's Error: it ended at once.
    """
    argv = [program("qemu-nbd"), "--shared=1", *image.words]
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with tempfile.TemporaryDirectory(prefix="thrave-nbd.") as folder:
            address = f"{folder}/s"
            listener.bind(address)
            listener.listen(1)
            client.connect(address)
        server = programs.Program(
            argv,
            timeout=math.inf,
            pass_fds=image.descriptors,
            listener=listener.fileno(),
            max_memory=programs.MAX_MEMORY,
        )
        listener.close()  # only the server has it from here on: if the server ends, so does the connection
        connection = client.dup()
        try:
            handle.aio_connect_socket(client.detach())
            _shake_hands(handle, interruption or Interruption())
            server.drop_output()
        except BaseException:
            connection.close()
            server.kill()
            raise
    return NbdServer(server, connection)


def _shake_hands(handle: Handle, interruption: Interruption) -> None:
    deadline = monotonic() + START_SECONDS
    while not handle.aio_is_ready():
        handle.poll(_POLL_MILLISECONDS)
        if interruption.is_requested:
            raise TimeoutError("nobody waits for it any more")
        if monotonic() > deadline:
            raise TimeoutError(f"qemu-nbd did not answer within {START_SECONDS:.0f} seconds")


# format -> options of qemu-img create. Without force_size the size of a vpc image is rounded up to whole cylinders.
# vhdx is not among them: QEMU's driver refuses to write what does not begin and end at a multiple of 4 KiB.
_OPTIONS = {"qcow2": "lazy_refcounts=off", "vmdk": "subformat=monolithicSparse", "vpc": "force_size=on"}


_CREATE_TIMEOUT = 600.0  # seconds


WRITABLE_FORMATS = tuple(_OPTIONS)
"""QEMU's names of what can be written."""


class ImageWriter:
    """An image that is being filled."""

    def __init__(self, path: Path, binding: NbdBinding) -> None:
        self._path = path
        self._binding = binding
        self._handle: Handle | None = binding.NBD()
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
    def _calling(self) -> Iterator[Handle]:
        if self._handle is None:
            raise VolumeUnwritableError(self._path, "it is closed")
        try:
            yield self._handle
        except (self._binding.Error, TimeoutError, programs.ProgramError, OSError) as error:
            raise VolumeUnwritableError(self._path, str(error)) from error


@contextmanager
def new_image(path: Path, image_format: str, size: int) -> Iterator[ImageWriter]:
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
    image = ImageWriter(path, load())
    _create(path, image_format, size)
    with closing(image):
        image.serve(image_format)
        yield image
        image.finish()


def _create(path: Path, image_format: str, size: int) -> None:
    if image_format not in WRITABLE_FORMATS:
        raise UnknownFormatError(image_format, WRITABLE_FORMATS)
    options = ["-q", "-f", image_format, "-o", _OPTIONS[image_format]]
    argv = [image_chain.program("qemu-img"), "create", *options, str(path), str(size)]
    try:
        done = programs.run(argv, timeout=_CREATE_TIMEOUT, max_memory=programs.MAX_MEMORY)
    except programs.ProgramError as error:
        raise VolumeUnwritableError(path, str(error)) from error
    if done.status:
        raise VolumeUnwritableError(
            path, done.error_text.strip().removeprefix("qemu-img: ") or "qemu-img create failed"
        )
