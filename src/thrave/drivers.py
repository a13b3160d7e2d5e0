"""Opens the object store that the settings name: a directory or S3, and by whose right bundles get into it.

The credentials of the service come from the environment or a file of their own, which nobody else may read. Nothing
here calls the store.

Which inventory a host has, as the settings say: instances that files describe, or libvirt's domains.

Nothing here asks a hypervisor, and libvirt's binding is loaded only where the settings want it.
"""

import configparser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from thrave import files
from thrave.buckets.base import ObjectStore
from thrave.buckets.directory_store import DirectoryStore
from thrave.buckets.errors import StoreSettingError
from thrave.buckets.s3_client import Credentials, StoreConfig
from thrave.buckets.s3_store import KeyOwner, OwnerKeyStore, ServiceKeyStore
from thrave.compute.base import HypervisorDriver
from thrave.compute.directory_driver import DirectoryDriver
from thrave.concurrency import new_lock
from thrave.config import Settings

if TYPE_CHECKING:
    from thrave.compute.libvirt.driver import LibvirtDriver


log = structlog.get_logger()


def open_store(settings: Settings, find_holder: Callable[[str], KeyOwner | None]) -> ObjectStore:
    """Open the store that the settings name.

    Args:
        settings: Of the service.
        find_holder: Who holds the access key of an id; None if nobody does.

    Raises:
        StoreSettingError: The store's address, its certificates or the service's credentials cannot be used.
    """
    if settings.store == "directory":
        return DirectoryStore(settings.directory.buckets)
    connection = store_connection(settings)
    return (
        OwnerKeyStore(connection, find_holder)
        if settings.upload_credentials == "policy"
        else ServiceKeyStore(connection)
    )


def store_connection(settings: Settings) -> StoreConfig:
    """How the store is called, with the service's own credentials if there are any.

    Raises:
        StoreSettingError: The file of credentials cannot be used.
    """
    file = None if settings.s3_credentials_file is None else CredentialsFile(settings.s3_credentials_file)
    return StoreConfig(
        endpoint=settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com",
        region=settings.s3_region,
        credentials=_credentials(settings) if file is None else file.read(),
        find_credentials=None if file is None else file.read,
        addressing=settings.s3_addressing_style,
        ca=settings.s3_ca_file,
        proxy=settings.s3_proxy.get_secret_value() if settings.s3_proxy else None,
        connections=settings.max_store_connections,
        timeout=settings.s3_timeout,
        send_timeout=settings.s3_send_timeout,
    )


def _credentials(settings: Settings) -> Credentials | None:
    if settings.s3_access_key_id is None or settings.s3_secret_access_key is None:
        return None
    token = settings.s3_session_token
    return Credentials(
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        session_token=token.get_secret_value() if token else None,
    )


class CredentialsFile:
    """The credentials in a file, read again when the file has changed. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path = path
        self._lock = new_lock()
        self._read: Credentials | None = None
        self._state: tuple[int, ...] | None = None
        """Of the file when it was read last, whether that succeeded or not."""

    def read(self) -> Credentials:
        """Return the credentials that the file holds now.

        A changed file that cannot be used is logged once, and the earlier credentials stay in use.

        Raises:
            StoreSettingError: The file cannot be used and never could.
        """
        with self._lock:
            state = _state(self._path)
            if self._read is not None and state == self._state:
                return self._read
            try:
                found = read_credentials(self._path)
            except StoreSettingError as error:
                if self._read is None:
                    raise StoreSettingError(f"The setting s3_credentials_file cannot be used: {error}") from None
                log.warning("changed credentials cannot be used; keeping the earlier ones", error=str(error))
            else:
                if self._read is not None and found != self._read:
                    log.info("credentials changed", access_key_id=found.access_key_id)
                self._read = found
            self._state = state  # of before the reading: a change meanwhile is read next time
            return self._read


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev, found.st_size)


def read_credentials(path: Path) -> Credentials:
    """Read a file of credentials as the AWS CLI has it: the section `[default]`.

    Raises:
        StoreSettingError: It cannot be read, others may read it, or it has no key.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(files.read_private(path).decode())
        section = parser["default"]
        return Credentials(
            access_key_id=section["aws_access_key_id"],
            secret_access_key=section["aws_secret_access_key"],
            session_token=section.get("aws_session_token"),
        )
    except OSError as error:
        # The system's errors have an errno; of ours the text is the reason.
        reason = f"{error.strerror}: {path}" if error.errno else str(error)
        raise StoreSettingError(reason) from None
    except (KeyError, ValueError, configparser.Error):  # whose own words quote the line
        raise StoreSettingError(
            f"{path} is no file of credentials: [default], aws_access_key_id = …, aws_secret_access_key = …"
        ) from None


def open_driver(settings: Settings) -> HypervisorDriver:
    """The inventory that the settings name.

    Raises:
        ComponentMissingError: libvirt's binding is not installed.
        HypervisorError: libvirt does not answer.
    """
    return open_described(settings) if settings.hypervisor == "directory" else open_adopted(settings)


def open_described(settings: Settings) -> DirectoryDriver:
    """The instances that files describe."""
    return DirectoryDriver(settings.effective_instance_dir)


def open_adopted(settings: Settings) -> "LibvirtDriver":
    """The domains that have been adopted. Raises as `open_instances`."""
    from thrave.compute.libvirt.driver import LibvirtDriver  # noqa: PLC0415 (needs a Debian package that few hosts have)

    return LibvirtDriver(settings.libvirt_uri, lock_folder=settings.directory.locks)
