"""Which store there is, as the settings say: a directory or S3, and by whose right bundles get into it.

The credentials of the service come from the environment or a file of their own, which nobody else may read. Nothing
here calls the store.
"""

import configparser
from collections.abc import Callable
from pathlib import Path

from thrave import files
from thrave.buckets.buckets import Buckets
from thrave.buckets.connection import Credentials, StoreConnection
from thrave.buckets.directory import DirectoryBuckets
from thrave.buckets.errors import InvalidArgument
from thrave.buckets.s3 import Holder, OwnersBuckets, ServiceBuckets
from thrave.config import Settings


def open_buckets(settings: Settings, find_holder: Callable[[str], Holder | None]) -> Buckets:
    """The store that the settings name.

    Args:
        settings: Of the service.
        find_holder: Who holds the access key of an id; None if nobody does.

    Raises:
        InvalidArgument: The store's address, its certificates or the service's credentials cannot be used.
    """
    if settings.store == "directory":
        return DirectoryBuckets(settings.directory.buckets)
    connection = store_connection(settings)
    return OwnersBuckets(connection, find_holder) if settings.upload == "policy" else ServiceBuckets(connection)


def store_connection(settings: Settings) -> StoreConnection:
    """How the store is called, with the service's own credentials if there are any.

    Raises:
        InvalidArgument: The file of credentials cannot be used.
    """
    return StoreConnection(
        endpoint=settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com",
        region=settings.s3_region,
        credentials=_credentials(settings),
        addressing=settings.s3_addressing,
        ca=settings.s3_ca,
        proxy=settings.s3_proxy.get_secret_value() if settings.s3_proxy else None,
        timeout=settings.s3_timeout,
    )


def _credentials(settings: Settings) -> Credentials | None:
    if settings.s3_credentials is not None:
        return read_credentials(settings.s3_credentials)
    if settings.s3_access_key_id is None or settings.s3_secret_access_key is None:
        return None
    token = settings.s3_session_token
    return Credentials(
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        session_token=token.get_secret_value() if token else None,
    )


def read_credentials(path: Path) -> Credentials:
    """Read a file of credentials as the AWS CLI has it: the section `[default]`.

    Raises:
        InvalidArgument: It cannot be read, others may read it, or it has no key.
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
        raise InvalidArgument(str(error)) from None
    except (KeyError, ValueError, configparser.Error):  # whose own words quote the line
        raise InvalidArgument(
            f"{path} is no file of credentials: [default], aws_access_key_id = …, aws_secret_access_key = …"
        ) from None
