"""`ThraveServer`: the `thrave serve` command in a process of its own, and what a client of it needs."""

import base64
import hashlib
import hmac
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any, ClassVar, Self

from pydantic import SecretStr

from thrave import programs
from thrave.components import open_components
from thrave.compute.description_files import InstanceDescription
from thrave.compute.directory_driver import DirectoryDriver, new_instance_id
from thrave.compute.instance import Instance, VolumeFile
from thrave.concurrency import start_later, start_thread, utc_now
from thrave.config import DataDirectory, Settings
from thrave.identity.accounts import AccessKey, Account

REGION = "us-east-1"
START_TIMEOUT = 120  # seconds, on a busy machine
_STDERR_TIMEOUT = 5  # seconds to read the rest of stderr of a server that has exited
_KEPT_LINES = 20  # lines of stderr in the message of ServerError


class ServerError(Exception):
    """The server did not start; the message contains its output."""


class ComponentMissingError(Exception):
    """A required library is not installed; the message names the package."""


@dataclass
class ThraveServer:
    """`thrave serve` in a process of its own."""

    command: ClassVar[str] = "serve"

    data: DataDirectory
    environment: Mapping[str, str] = field(default_factory=dict)
    """Settings for the server, as `THRAVE_…` variables."""
    url: str = ""
    process: programs.ServerProcess | None = field(default=None, repr=False)
    _log: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES), repr=False)

    @classmethod
    @contextmanager
    def running(cls, data: Path, **settings: object) -> Iterator[Self]:
        """Start a server and stop it at the end of the block.

        Args:
            data: Data directory.
            settings: Any field of `thrave.config.Settings`, such as `shutdown_timeout=2`.

        Raises:
            ServerError: The server did not start.
        """
        server = cls(DataDirectory(data), {f"THRAVE_{name.upper()}": str(value) for name, value in settings.items()})
        server.start()
        try:
            yield server
        finally:
            server.stop()

    def start(self) -> None:
        """Start the server and wait until it accepts requests. Raises ServerError after two minutes."""
        errors, errors_of_server = os.pipe()
        arguments = [self.command, "--data-dir", str(self.data.root), "--listen-port", "0"]
        try:
            self.process = self._launch(arguments, {**os.environ, **self.environment}, errors_of_server)
        finally:
            os.close(errors_of_server)
        kept = self._log
        kept.clear()
        forward = start_thread(
            "thrave-stderr",
            partial(_forward, errors, os.dup(2), kept),
            on_failure=lambda error: kept.append(f"{error}\n"),
        )
        disarm = start_later("start limit", START_TIMEOUT, self.process.kill)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        disarm()
        if not line.startswith("listening on "):
            self.stop()
            forward.join(_STDERR_TIMEOUT)
            reason = "".join(kept).strip() or line or f"no output within {START_TIMEOUT} seconds"
            raise ServerError(f"thrave {self.command} ended with status {self.process.returncode}: {reason}")
        self.url = line.removeprefix("listening on ")

    def _launch(self, arguments: Sequence[str], environment: Mapping[str, str], stderr: int) -> programs.ServerProcess:
        return programs.start_server([sys.executable, "-m", "thrave", *arguments], environment, stderr=stderr)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Send SIGTERM or another signal to the server, and wait until it has exited."""
        if self.process is not None:
            self.process.send_signal(signal_number)
            self.process.communicate(timeout=START_TIMEOUT)

    def account(self, name: str, certificate: str | None = None) -> tuple[Account, AccessKey]:
        """Create an account and its first access key; `certificate` is PEM."""
        url = self.environment.get("THRAVE_DATABASE_URL")
        components = open_components(
            Settings(data_dir=self.data.root, database_url=None if url is None else SecretStr(url))
        )
        try:
            return components.accounts.create(name, certificate)
        finally:
            components.database.dispose()

    def instance(self, account_id: str, root_volume: Path, *, volumes: Sequence[Path] = (), **details: Any) -> Instance:  # noqa: ANN401 (each field has its own type)
        """Add a running Windows instance.

        Args:
            account_id: Account id of the owner.
            root_volume: The raw disk that is bundled.
            volumes: Other raw disks, which are not bundled.
            details: Any field of `thrave.compute.description_files.InstanceDescription`, such as `platform=None`.
        """
        given = {
            "instance_id": new_instance_id(),
            "account_id": account_id,
            "platform": "windows",
            "root_volume": VolumeFile(path=root_volume.absolute()),
            "volumes": tuple(VolumeFile(path=volume.absolute(), device_name=f"xvd{letter}")
                             for volume, letter in zip(volumes, ascii_lowercase[1:], strict=False)),
        }  # fmt: skip
        description = InstanceDescription(**{**given, **details})
        self.instances.add(description)
        return description

    @property
    def instances(self) -> DirectoryDriver:
        """The instances of the server."""
        return DirectoryDriver(Path(self.environment.get("THRAVE_INSTANCE_DIR", self.data.instances)))

    def client(self, key: AccessKey, service: str = "ec2", **options: Any) -> Any:  # noqa: ANN401 (boto3 ships no types)
        """Return an unmodified boto3 client for EC2, or for `sts`; `options` are those of `boto3.client`.

        The client trusts the certificate of the setting `tls_certificate_file`. Raises ComponentMissingError if boto3
        is not installed.
        """
        given = {
            "endpoint_url": self.url,
            "region_name": REGION,
            "verify": self.environment.get("THRAVE_TLS_CERTIFICATE_FILE"),
            "aws_access_key_id": key.access_key_id,
            "aws_secret_access_key": key.secret_access_key,
        }
        return import_boto3().client(service, **{**given, **options})

    def storage(self, key: AccessKey, bucket: str, prefix: str, **changes: object) -> dict[str, dict[str, object]]:
        """Return the `Storage` of a BundleInstance call, with an upload policy as the AWS CLI creates it."""
        policy, signature = upload_policy(key.secret_access_key, bucket, prefix)
        storage = {
            "AWSAccessKeyId": key.access_key_id,
            "Bucket": bucket,
            "Prefix": prefix,
            "UploadPolicy": policy,
            "UploadPolicySignature": signature,
        }
        return {"S3": {**storage, **changes}}


def import_boto3() -> Any:  # noqa: ANN401 (boto3 ships no types)
    """Import boto3, which only tests and the demo need. Raises ComponentMissingError if it is not installed."""
    try:
        import boto3  # noqa: PLC0415 (see above)
    except ImportError:
        raise ComponentMissingError("boto3 is not installed: pip install 'thrave[demo]'") from None
    return boto3


def _forward(descriptor: int, stderr: int, kept: deque[str]) -> None:
    """Copy a server's stderr to ours, and keep the last lines.

    Args:
        descriptor: Read end of the server's stderr.
        stderr: Our stderr when the server was started; closed at the end.
        kept: Receives the last lines.
    """
    with open(descriptor, encoding="utf-8", errors="replace") as lines, open(stderr, "wb", buffering=0) as copy:
        for line in lines:
            kept.append(line)
            with suppress(OSError):
                copy.write(line.encode())


def upload_policy(secret_access_key: str, bucket: str, prefix: str, *, hours: float = 24) -> tuple[bytes, str]:
    """Return an upload policy (JSON) for a bundle, and the signature of its base64 text, as the AWS CLI signs it."""
    expiration = utc_now() + timedelta(hours=hours)
    conditions = [{"bucket": bucket}, {"acl": "ec2-bundle-read"}, ["starts-with", "$key", prefix]]
    policy = json.dumps({"expiration": expiration.strftime("%Y-%m-%dT%H:%M:%SZ"), "conditions": conditions}).encode()
    signed = hmac.new(secret_access_key.encode(), base64.b64encode(policy), hashlib.sha1)
    return policy, base64.b64encode(signed.digest()).decode()
