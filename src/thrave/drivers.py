"""Opens the object store and the hypervisor driver that the settings name.

The service's own credentials for the store come from the environment or from a private file. Opening a store calls
nothing. The libvirt binding is loaded only if the settings name libvirt.
"""

import configparser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

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


def open_store(settings: Settings, find_key_owner: Callable[[str], KeyOwner | None]) -> ObjectStore:
    """Open the object store that the settings name.

    Args:
        settings: Of the service.
        find_key_owner: Returns the owner of an access key id; None if there is none.

    Raises:
        StoreSettingError: The endpoint, the CA file or the service's credentials cannot be used.
    """
    match settings.store:
        case "directory":
            return DirectoryStore(settings.directory.buckets)
        case "s3":
            config = store_config(settings)
            is_by_policy = settings.upload_credentials == "policy"
            return OwnerKeyStore(config, find_key_owner) if is_by_policy else ServiceKeyStore(config)
        case unknown:
            assert_never(unknown)


def store_config(settings: Settings) -> StoreConfig:
    """Return the configuration of the S3 client, with the service's own credentials if there are any.

    Raises:
        StoreSettingError: The credentials file cannot be used.
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
        max_connections=settings.max_store_connections,
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
    """The credentials in a file, which is read again when it changes. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Use the file at `path`; it is read by `read`."""
        self._path = path
        self._lock = new_lock()
        self._credentials: Credentials | None = None
        self._file_state: tuple[int, ...] | None = None  # at the last attempt to read, successful or not

    def read(self) -> Credentials:
        """Return the current credentials in the file.

        If a changed file cannot be used, the earlier credentials stay in use, and a warning is logged once.

        Raises:
            StoreSettingError: The file cannot be used, and there are no earlier credentials.
        """
        with self._lock:
            # Read before the content: a change in between is detected by the next call.
            file_state = _file_state(self._path)
            if self._credentials is not None and file_state == self._file_state:
                return self._credentials
            try:
                found = read_credentials(self._path)
            except StoreSettingError as error:
                if self._credentials is None:
                    raise StoreSettingError(f"The setting s3_credentials_file cannot be used: {error}") from None
                log.warning("changed credentials cannot be used; keeping the earlier ones", error=str(error))
            else:
                if self._credentials is not None and found != self._credentials:
                    log.info("credentials changed", access_key_id=found.access_key_id)
                self._credentials = found
            self._file_state = file_state
            return self._credentials


def _file_state(path: Path) -> tuple[int, ...]:
    """Return values that change when a file is written or replaced; empty if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev, found.st_size)


def read_credentials(path: Path) -> Credentials:
    """Read the section `[default]` of a credentials file in the format of the AWS CLI.

    Raises:
        StoreSettingError: It cannot be read, other users may read it, or it has no key.
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
        # Errors of the system have an errno. `NotPrivateError` has none; its message is the reason.
        reason = f"{error.strerror}: {path}" if error.errno else str(error)
        raise StoreSettingError(reason) from None
    except (KeyError, ValueError, configparser.Error):  # their messages quote the line, which may be a secret
        raise StoreSettingError(
            f"{path} is not a credentials file. Expected: [default], aws_access_key_id = …, aws_secret_access_key = …"
        ) from None


def open_driver(settings: Settings) -> HypervisorDriver:
    """Open the hypervisor driver that the settings name. Does not call the hypervisor."""
    return open_directory_driver(settings) if settings.hypervisor == "directory" else open_libvirt_driver(settings)


def open_directory_driver(settings: Settings) -> DirectoryDriver:
    """Open the driver for instances that JSON files describe."""
    return DirectoryDriver(settings.effective_instance_dir)


def open_libvirt_driver(settings: Settings) -> "LibvirtDriver":
    """Open the driver for adopted libvirt domains."""
    from thrave.compute.libvirt.driver import LibvirtDriver  # noqa: PLC0415 (needs a Debian package that few hosts have)

    return LibvirtDriver(settings.libvirt_uri, lock_folder=settings.directory.locks)
