"""Test doubles of EC2 as servers with the same interface, for the probes: Thrave, moto and ministack.

A probe uses unmodified boto3 clients. Only what an EC2 client cannot do is done here: to know the content of an
instance's root volume, and to let a bundle task continue.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from support.eventually import eventually
from support.servers.stores import free_ports
from thrave.identity.certificates import new_certificate
from thrave.testing import REGION, ServiceAccount, ServiceClock, ThraveService, upload_policy

MINISTACK_PORT = "GATEWAY_PORT"
ONCE = Config(retries={"total_max_attempts": 1}, read_timeout=20)
NEW_IMAGE = "ami-0123456789abcdef0"


@dataclass
class Double:
    """A running test double, or Thrave.

    Attributes:
        access_key_id: Key of the caller.
        secret_access_key: Its secret.
        ec2_url: Endpoint of EC2.
        s3_url: Endpoint of S3.
        private_key: PEM of the key for which the caller's bundles are encrypted; None if no certificate can be set.
    """

    access_key_id: str
    secret_access_key: str
    ec2_url: str
    s3_url: str
    private_key: str | None = None
    prefixes: int = field(default=0, init=False)

    def client(self, service: str) -> Any:
        """Return a boto3 client that sends each request once."""
        return boto3.client(
            service,
            endpoint_url=self.s3_url if service == "s3" else self.ec2_url,
            region_name=REGION,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=ONCE,
        )

    def storage(self, bucket: str, prefix: str, *, hours: float = 24) -> dict[str, Any]:
        """Return the `Storage` of BundleInstance."""
        policy, signature = upload_policy(self.secret_access_key, bucket, prefix, hours=hours)
        s3 = {"AWSAccessKeyId": self.access_key_id, "Bucket": bucket, "Prefix": prefix}
        return {"S3": {**s3, "UploadPolicy": policy, "UploadPolicySignature": signature}}

    def new_prefix(self) -> str:
        """Return a prefix that no bundle has."""
        self.prefixes += 1
        return f"image{self.prefixes}"

    def new_instance(self, *, platform: str | None = "windows") -> str:
        """Run an instance; return its id."""
        run = self.client("ec2").run_instances(ImageId=self.image_id(platform), MinCount=1, MaxCount=1)
        return str(run["Instances"][0]["InstanceId"])

    def image_id(self, _platform: str | None) -> str:
        """Return an image with that platform; every image if the double knows none."""
        return NEW_IMAGE

    def root_volume(self, _instance_id: str) -> bytes | None:
        """Return the content of an instance's root volume; None if it has none."""
        return None

    @contextmanager
    def step_by_step(self) -> Iterator[None]:
        """Within the block a task changes its state only by `advance`, if the double can do that."""
        yield

    def advance(self, bundle_id: str) -> None:
        """Let a task continue with the next state."""


@dataclass
class Thrave(Double):
    """Thrave with a store in memory."""

    account: ServiceAccount = field(kw_only=True)

    @classmethod
    def of(cls, service: ThraveService) -> "Thrave":
        """Create an account with a certificate."""
        certificate, private_key = new_certificate("probe")
        account, key = service.account("probe", certificate)
        double = ServiceAccount(service, account.account_id, key)
        return cls(key.access_key_id, key.secret_access_key, service.url, service.s3_url, private_key, account=double)

    def new_instance(self, *, platform: str | None = "windows") -> str:
        """Thrave has no RunInstances: add an instance."""
        return self.account.instance(platform=platform).instance_id

    def root_volume(self, instance_id: str) -> bytes | None:
        """Read the disk."""
        return self.account.service.instances.get(instance_id).root_volume.path.read_bytes()

    @contextmanager
    def step_by_step(self) -> Iterator[None]:
        """Hold tasks."""
        ServiceClock(self.account.service).hold()
        try:
            yield
        finally:
            self.account.service.reset()

    def advance(self, bundle_id: str) -> None:
        """Let the task continue, and wait until it is in the next state."""
        ServiceClock(self.account.service).advance(bundle_id)


@dataclass
class Moto(Double):
    """moto's server."""

    def image_id(self, platform: str | None) -> str:
        """Return one of moto's own images."""
        images = self.client("ec2").describe_images()["Images"]
        return str(next(image["ImageId"] for image in images if image.get("Platform") == platform))


@dataclass
class MotoWithThrave(Moto):
    """moto's server with `thrave.moto`."""

    def image_id(self, platform: str | None) -> str:
        """Return the image of Windows with an instance-store root volume."""
        from thrave.moto import WINDOWS_IMAGE_ID

        return WINDOWS_IMAGE_ID if platform == "windows" else super().image_id(platform)

    def root_volume(self, instance_id: str) -> bytes | None:
        """Return the generated disk."""
        from thrave.moto import root_disk

        return root_disk(instance_id)

    @contextmanager
    def step_by_step(self) -> Iterator[None]:
        """Each call of DescribeBundleTasks changes the state once."""
        self._set_transition({"progression": "manual", "times": 1})
        try:
            yield
        finally:
            self._set_transition({"progression": "immediate"})

    def _set_transition(self, transition: dict[str, Any]) -> None:
        body = json.dumps({"model_name": "thrave::bundle-task", "transition": transition}).encode()
        url = f"{self.ec2_url}/moto-api/state-manager/set-transition"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request) as response:
            assert response.status == 201


KEY = {"AWS_ACCESS_KEY_ID": "AKIAPROBE", "AWS_SECRET_ACCESS_KEY": "probe-secret-of-the-conformance-run"}


@contextmanager
def moto(folder: Path) -> Iterator[Moto]:
    """Run moto's server."""
    with _server(folder, [sys.executable, "-m", "moto.server"], port_option="-p") as url:
        yield Moto(KEY["AWS_ACCESS_KEY_ID"], KEY["AWS_SECRET_ACCESS_KEY"], url, url)


@contextmanager
def moto_with_thrave(folder: Path) -> Iterator[MotoWithThrave]:
    """Run moto's server with `thrave.moto`, and give its account a certificate."""
    with _server(folder, [sys.executable, "-m", "thrave.moto"], port_option="-p") as url:
        certificate, private_key = new_certificate("probe")
        double = MotoWithThrave(KEY["AWS_ACCESS_KEY_ID"], KEY["AWS_SECRET_ACCESS_KEY"], url, url, private_key)
        iam = double.client("iam")
        iam.create_user(UserName="probe")
        iam.upload_signing_certificate(UserName="probe", CertificateBody=certificate)
        yield double


@contextmanager
def ministack(folder: Path, program: Path) -> Iterator[Double]:
    """Run ministack, which is installed in an environment of its own."""
    with _server(folder, [str(program)], port_variable=MINISTACK_PORT) as url:
        yield Double(KEY["AWS_ACCESS_KEY_ID"], KEY["AWS_SECRET_ACCESS_KEY"], url, url)


@contextmanager
def thrave(folder: Path) -> Iterator[Thrave]:
    """Run Thrave."""
    with ThraveService.running(folder / "thrave") as service:
        yield Thrave.of(service)


@contextmanager
def _server(folder: Path, argv: list[str], *, port_option: str = "", port_variable: str = "") -> Iterator[str]:
    """Run a server on a free port, and wait until it answers."""
    (port,) = map(str, free_ports(1))
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **KEY, **({port_variable: port} if port_variable else {})}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*argv, *([port_option, port] if port_option else [])],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: process.poll() is not None or _answers(url), f"{argv[0]} answers at {url}")
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
