"""A volume in one of QEMU's formats, served by qemu-nbd and read through libnbd.

qemu-nbd is the reference implementation of these formats. It is started by socket activation (sd_listen_fds(3)): the
socket is connected before the server runs, in a private folder, so nobody else can come in between. The server is
read-only, is told the format, takes one client, and ends when that client's connection does: with close(), and also
when this process is killed. No port, daemon or kernel module is used.
"""

import math
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from thrave import programs
from thrave.programs import Program
from thrave.volumes import chain, libnbd
from thrave.volumes.chain import Arguments
from thrave.volumes.errors import VolumeError, VolumeUnreadableError
from thrave.volumes.inspection import Inspection, check_size, program
from thrave.volumes.interruption import Interruption
from thrave.volumes.volume import Extent, joined

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
        self._binding = libnbd.load()
        secret = inspection.check(secret_file)
        self._handle: libnbd.Handle | None
        arguments = chain.arguments(inspection.layers, secret)
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
            return joined(
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

    def _opened(self) -> libnbd.Handle:
        if self._handle is None:
            raise VolumeUnreadableError(self._path, "it is closed")
        return self._handle

    def _read(self, offset: int, length: int) -> memoryview:
        first, end = offset - offset % _BLOCK, offset + length
        last = min(end + -end % _BLOCK, max(end, self._size))
        whole = memoryview(self._opened().pread(last - first, first))
        return whole[offset - first : end - first]

    def _connect(self, image: Arguments, interruption: Interruption) -> tuple[libnbd.Handle, NbdServer]:
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


def start_server(handle: libnbd.Handle, image: Arguments, interruption: Interruption | None = None) -> NbdServer:
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


def _shake_hands(handle: libnbd.Handle, interruption: Interruption) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not handle.aio_is_ready():
        handle.poll(_POLL_MILLISECONDS)
        if interruption.is_requested:
            raise TimeoutError("nobody waits for it any more")
        if time.monotonic() > deadline:
            raise TimeoutError(f"qemu-nbd did not answer within {START_SECONDS:.0f} seconds")
