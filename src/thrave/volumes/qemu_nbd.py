"""Reads and creates images in QEMU's formats, through one qemu-nbd process for each image and libnbd.

qemu-nbd is started by socket activation (sd_listen_fds(3)): the socket is connected before the server runs, in a
private folder, so no other process can connect. The server gets the format, accepts one client, and ends when the
connection ends: by `close`, and also when this process is killed. No port, daemon or kernel module is used.
"""

import math
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol, cast

from thrave import programs
from thrave.concurrency import monotonic
from thrave.debian_modules import PYTHON_VERSION, DebianModuleNotFoundError, import_debian_module
from thrave.programs import Program
from thrave.volumes.base import Extent, Interruption, merge_extents
from thrave.volumes.errors import (
    ToolNotInstalled,
    UnknownFormatError,
    VolumeError,
    VolumeUnreadableError,
    VolumeUnwritableError,
)
from thrave.volumes.image_chain import ImageArguments, ImageChain, check_size, find_program, image_arguments

# libnbd is on no Python package index. Debian's package installs the binding for the system's Python only.
_PACKAGE = "python3-libnbd"

ALLOCATION = "base:allocation"
READS_AS_ZEROS = 2  # NBD_STATE_ZERO; NBD_STATE_HOLE (1) alone promises nothing about the content (NBD protocol)

START_TIMEOUT = 30.0  # seconds until qemu-nbd answers
_STOP_TIMEOUT = 30.0  # seconds until a server ends after its connection was closed
_POLL_MILLISECONDS = 200
_CREATE_TIMEOUT = 600.0  # seconds for qemu-img create

_MAX_READ = 16 << 20  # bytes in one NBD read; servers may refuse more than 32 MiB (NBD protocol, "maximum payload")
_BLOCK = 4096  # reads begin and end at multiples of this; some formats (vhdx) refuse others
_MAX_STATUS = 2 << 30  # bytes in one block status request, whose length has 32 bits

# format -> options of qemu-img create. Without force_size the size of a vpc image is rounded up to whole cylinders.
# Without vhdx: QEMU's driver refuses writes that do not begin and end at a multiple of 4 KiB.
_CREATE_OPTIONS = {"qcow2": "lazy_refcounts=off", "vmdk": "subformat=monolithicSparse", "vpc": "force_size=on"}

WRITABLE_FORMATS = tuple(_CREATE_OPTIONS)
"""The formats that can be written, by QEMU's names."""

ExtentCallback = Callable[[str, int, list[int], object], object]
"""Called with context, offset in bytes, [length, flags, length, flags, …], error."""


class Handle(Protocol):
    """The part of `nbd.NBD` (libnbd(3)) in use here. Thread-safe; does one call at a time."""

    def add_meta_context(self, name: str) -> None:
        """Request a metadata context, before connecting."""

    def aio_connect_socket(self, sock: int) -> None:
        """Start the handshake on a connected socket; the descriptor is closed with this handle."""

    def aio_is_ready(self) -> bool:
        """Return whether the handshake has finished."""

    def poll(self, timeout: int) -> int:
        """Continue the handshake; return 0 if nothing happened for `timeout` milliseconds."""

    def get_size(self) -> int:
        """Return the size of the export, in bytes."""

    def block_status(self, count: int, offset: int, extent: ExtentCallback) -> None:
        """Report runs from `offset` on, of about `count` bytes, possibly less."""

    def pread(self, count: int, offset: int) -> bytearray:
        """Read `count` bytes, or raise an error."""

    def pwrite(self, buf: memoryview, offset: int) -> None:
        """Write the whole buffer, or raise an error."""

    def flush(self) -> None:
        """Make the server flush all writes to the disk."""

    def shutdown(self) -> None:
        """Announce the end of the connection and close it."""


class NbdBinding(Protocol):
    """The module `nbd`."""

    @property
    def NBD(self) -> Callable[[], Handle]:  # noqa: N802 (libnbd's name)
        """The class of handles."""

    @property
    def Error(self) -> type[Exception]:  # noqa: N802 (libnbd's name)
        """The error that every call raises."""


def load_binding() -> NbdBinding:
    """Import libnbd's Python binding, also in a virtual environment (`debian_modules.py`).

    Raises:
        ToolNotInstalled: The binding is not installed, or was built for another Python.
    """
    try:
        return cast("NbdBinding", import_debian_module("nbd", "libnbdmod"))
    except DebianModuleNotFoundError:
        raise ToolNotInstalled(f"libnbd for Python {PYTHON_VERSION}", _PACKAGE) from None


class NbdServer:
    """A running qemu-nbd with one client."""

    def __init__(self, program: Program, connection: socket.socket) -> None:
        """Take ownership of both; `connection` is a duplicate descriptor of the client's connection."""
        self._program = program
        self._connection = connection

    def kill(self) -> None:
        """Close the connection and kill the server. Can be called from another thread during a request."""
        with suppress(OSError):  # closed before
            self._connection.shutdown(socket.SHUT_RDWR)
        self._program.kill()

    def stop(self) -> None:
        """Close the connection and wait until the server has ended; kill it if it does not end."""
        # libnbd closes the socket only when its handle is freed, and the traceback of an error can still refer to it.
        with suppress(OSError):  # the server has closed it, or this is the second call
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            self._program.poll(_STOP_TIMEOUT)
        finally:
            self._program.kill()


class QemuVolume:
    """Reads an image through its own read-only qemu-nbd, the reference implementation of these formats.

    Args:
        chain: The image; its owner closes it after this volume.
        secret_file: Contains the passphrase of the encrypted images.

    Raises:
        VolumeError: QEMU reports a damaged image, a component is missing, the server does not answer within
            START_TIMEOUT, or it serves another size than the header has.
    """

    def __init__(self, chain: ImageChain, secret_file: Path | None = None) -> None:
        self._path = chain.layers[0].path
        self._binding = load_binding()
        secret = chain.check_images(secret_file)
        self._handle: Handle | None
        self._handle, self._server = self._connect(image_arguments(chain.layers, secret), chain.interruption)
        self._size = self._handle.get_size()
        try:
            check_size(chain.layers[0], self._size)
        except VolumeError:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Size in bytes, as the guest sees it."""
        return self._size

    def extents(self) -> list[Extent]:
        """Return the runs that base:allocation does not report as zeros; QEMU 7.2 reports no holes of vhdx."""
        try:
            return merge_extents(
                [(offset, length) for offset, length, flags in self._statuses() if not flags & READS_AS_ZEROS]
            )
        except self._binding.Error as error:
            raise VolumeUnreadableError(self._path, f"no extents: {error}") from error

    def prefetch(self, offset: int, length: int) -> None:
        """Do nothing: one connection handles one request at a time."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` by reads of at most 16 MiB."""
        for start in range(0, len(buffer), _MAX_READ):
            chunk = buffer[start : start + _MAX_READ]
            try:
                chunk[:] = self._read(offset + start, len(chunk))
            except self._binding.Error as error:
                # QEMU 7.2 closes the connection after a failed read, so libnbd's message alone would be misleading.
                reason = f"qemu-nbd cannot read it: the image, or the disk below it, is damaged ({error})"
                raise VolumeUnreadableError(self._path, reason, offset=offset + start) from error

    def close(self) -> None:
        """Close the connection, which ends the server, and wait for its end."""
        self._handle = None
        self._server.stop()

    def _open_handle(self) -> Handle:
        if self._handle is None:
            raise VolumeUnreadableError(self._path, "it is closed")
        return self._handle

    def _read(self, offset: int, length: int) -> memoryview:
        first, end = offset - offset % _BLOCK, offset + length
        last = min(end + -end % _BLOCK, max(end, self._size))
        blocks = memoryview(self._open_handle().pread(last - first, first))
        return blocks[offset - first : end - first]

    def _connect(self, image: ImageArguments, interruption: Interruption) -> tuple[Handle, NbdServer]:
        handle = self._binding.NBD()
        handle.add_meta_context(ALLOCATION)
        try:
            image = ImageArguments(["--read-only", *image.argv], image.descriptors)
            server = start_server(handle, image, interruption)
        except (self._binding.Error, TimeoutError, programs.ProgramError, OSError) as error:
            raise VolumeUnreadableError(self._path, f"qemu-nbd does not serve it ({error})") from error
        interruption.add(server.kill)
        return handle, server

    def _statuses(self) -> Iterator[tuple[int, int, int]]:
        """Yield (offset, length, flags) of the whole volume, in ascending order."""
        offset = 0
        while offset < self._size:
            for length, flags in self._status(offset):
                length_within = min(length, self._size - offset)
                yield offset, length_within, flags
                offset += length_within

    def _status(self, offset: int) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []

        def record(context: str, start: int, entries: list[int], _error: object) -> None:
            if context == ALLOCATION and start == offset:
                runs.extend(zip(entries[::2], entries[1::2], strict=True))

        self._open_handle().block_status(min(_MAX_STATUS, self._size - offset), offset, record)
        if not any(length for length, _ in runs):  # otherwise the caller would never end
            raise VolumeUnreadableError(self._path, "no extents from here on", offset=offset)
        return runs


def start_server(handle: Handle, image: ImageArguments, interruption: Interruption | None = None) -> NbdServer:
    """Start a qemu-nbd and connect a new handle to it.

    Args:
        handle: Not yet connected.
        image: Options and image (`image_chain.image_arguments`).
        interruption: Ends the wait for the handshake.

    Returns:
        The server; the caller stops it.

    Raises:
        ToolNotInstalled: qemu-nbd is not installed.
        ProgramError: qemu-nbd cannot be started.
        OSError: No socket can be created.
        TimeoutError: No answer within START_TIMEOUT, or interrupted.
        Exception: The binding's Error: qemu-nbd ended at once.
    """
    argv = [find_program("qemu-nbd"), "--shared=1", *image.argv]
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
        listener.close()  # now only the server has it, so the connection ends when the server ends
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
    deadline = monotonic() + START_TIMEOUT
    while not handle.aio_is_ready():
        handle.poll(_POLL_MILLISECONDS)
        if interruption.is_requested:
            raise TimeoutError("reading was interrupted")
        if monotonic() > deadline:
            raise TimeoutError(f"qemu-nbd did not answer within {START_TIMEOUT:.0f} seconds")


class ImageWriter:
    """A new image that is written through its own qemu-nbd."""

    def __init__(self, path: Path, binding: NbdBinding) -> None:
        self._path = path
        self._binding = binding
        self._handle: Handle | None = binding.NBD()
        self._server: NbdServer | None = None

    def connect(self, image_format: str) -> None:
        """Start the server and connect to it. Raises VolumeUnwritableError."""
        with self._open_handle() as handle:
            self._server = start_server(handle, ImageArguments([f"--format={image_format}", str(self._path)]))

    def write(self, offset: int, data: memoryview) -> None:
        """Write the data, at most 32 MiB, at an offset in bytes. Raises VolumeUnwritableError."""
        with self._open_handle() as handle:
            handle.pwrite(data, offset)

    def finish(self) -> None:
        """Flush data and metadata to the disk. Raises VolumeUnwritableError."""
        with self._open_handle() as handle:
            handle.flush()
            handle.shutdown()

    def close(self) -> None:
        """Close the connection, which ends the server, and wait for its end. May be called again."""
        self._handle = None
        if self._server is not None:
            self._server.stop()

    @contextmanager
    def _open_handle(self) -> Iterator[Handle]:
        if self._handle is None:
            raise VolumeUnwritableError(self._path, "it is closed")
        try:
            yield self._handle
        except (self._binding.Error, TimeoutError, programs.ProgramError, OSError) as error:
            raise VolumeUnwritableError(self._path, str(error)) from error


@contextmanager
def create_image(path: Path, image_format: str, size: int) -> Iterator[ImageWriter]:
    """Create an image. It is complete and on the disk if the block ends without an error.

    qemu-img creates it empty, so ranges that are not written stay unallocated and read as zeros. No raw copy is on the
    disk at any time. The format is given to both programs and never probed.

    Args:
        path: A file that should exist already, empty and with its final mode. The caller renames it afterwards.
        image_format: One of `WRITABLE_FORMATS`.
        size: Bytes, as a guest sees them.

    Raises:
        UnknownFormatError: Another format.
        ToolNotInstalled: QEMU's programs or libnbd are not installed.
        VolumeUnwritableError: The image cannot be created, or the disk is full.
    """
    path = path.absolute()
    image = ImageWriter(path, load_binding())
    _create_empty(path, image_format, size)
    with closing(image):
        image.connect(image_format)
        yield image
        image.finish()


def _create_empty(path: Path, image_format: str, size: int) -> None:
    if image_format not in WRITABLE_FORMATS:
        raise UnknownFormatError(image_format, WRITABLE_FORMATS)
    options = ["-q", "-f", image_format, "-o", _CREATE_OPTIONS[image_format]]
    argv = [find_program("qemu-img"), "create", *options, str(path), str(size)]
    try:
        finished = programs.run(argv, timeout=_CREATE_TIMEOUT, max_memory=programs.MAX_MEMORY)
    except programs.ProgramError as error:
        raise VolumeUnwritableError(path, str(error)) from error
    if finished.status:
        reason = finished.error_text.strip().removeprefix("qemu-img: ")
        raise VolumeUnwritableError(path, reason or "qemu-img create failed")
