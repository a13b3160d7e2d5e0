"""Puts the actions into moto: a subclass of moto's EC2 responses, and one table entry that names it.

`thrave.ec2.app.handle_request` handles three actions, as in the service. moto has authenticated the request before, and
has checked IAM policies if that is enabled.
"""

import uuid
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlencode

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate
from moto.core.responses import ActionResult
from moto.ec2 import urls
from moto.ec2.responses import EC2Response

from thrave.concurrency import new_lock, random_bytes
from thrave.ec2.app import handle_request
from thrave.ec2.authentication import Ec2Request
from thrave.ec2.backend import Ec2Backend, RateLimit
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import error_document
from thrave.ec2.service_models import EC2
from thrave.identity.accounts import AccessKey, Accounts
from thrave.identity.certificates import ServiceIdentity, load_certificate, new_private_key, self_signed
from thrave.moto.adapters import MotoBuckets, MotoInstances, MotoKeys
from thrave.moto.bundle_tasks import MotoBundleTask, MotoTasks
from thrave.moto.disks import GeneratedDisk
from thrave.moto.images import FILTERS, add_windows_image, register_bundle
from thrave.tasks.models import BundleRequest, BundleTask

if TYPE_CHECKING:
    from thrave.compute.power import PowerControl
    from thrave.tasks.task_service import BundleTaskService

_URL = "{0}/"  # the key of EC2's only entry in moto's table
_TASKS = "thrave_tasks"  # an attribute of moto's EC2Backend: moto's reset removes it with everything else
_REQUESTS_PER_SECOND = 1_000_000  # no rate limit: tests send requests as fast as they can


class _Installation:
    """The settings of this process.

    Attributes:
        known_keys: Secrets of access keys that moto's IAM has not created.
        identity: The certificate and keys of the service.
        lock: Requests to moto's server come from several threads.
    """

    def __init__(self, known_keys: Mapping[str, str], identity: ServiceIdentity) -> None:
        self.known_keys = dict(known_keys)
        self.identity = identity
        self.lock = new_lock()


_installed: list[_Installation] = []  # none or one


def install(*, access_keys: Mapping[str, str] | None = None, service_dir: Path | None = None) -> None:
    """Add the bundle actions and instance-store images to moto's EC2. A later call only replaces the settings.

    Call it before the first use of moto's EC2 (`mock_aws`, a moto server): moto reads its table of URLs only once.

    Args:
        access_keys: Secrets of access keys, by their ids, that may sign upload policies. Keys that moto's IAM has
            created are known, and so is the key in `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
        service_dir: Folder with the certificate and keys of the service, created the first time. Without it, the keys
            are new and in memory only.
    """
    identity = _new_identity() if service_dir is None else ServiceIdentity.open_or_create(service_dir)
    _installed[:] = [_Installation(access_keys or {}, identity)]
    urls.url_paths[_URL] = BundlingEC2Response.dispatch


def service_certificate() -> Certificate:
    """Return the certificate whose key signs manifests. Raises RuntimeError if `install` was not called."""
    return _settings().identity.certificate


def service_key() -> RSAPrivateKey:
    """Return the key that opens every bundle. Raises RuntimeError if `install` was not called."""
    return _settings().identity.private_key


def root_disk(instance_id: str) -> bytes:
    """Return the content of an instance's root disk, as BundleInstance bundles it."""
    return GeneratedDisk(instance_id).content


def _settings() -> _Installation:
    if not _installed:
        raise RuntimeError("moto has no bundle actions yet: call thrave.moto.install() first.")
    return _installed[0]


def _new_identity() -> ServiceIdentity:
    key = new_private_key()
    return ServiceIdentity(self_signed("Thrave in moto", key), key, Ed25519PrivateKey.generate())


def _matches(image: Any, filters: Sequence[Mapping[str, Any]]) -> bool:  # noqa: ANN401 (moto's Ami)
    """Whether an image has one of the values of each filter; `*` and `?` are wildcards."""
    return all(
        any(fnmatchcase(getattr(image, FILTERS[given["Name"]]) or "", value) for value in given.get("Values", ()))
        for given in filters
    )


class BundlingEC2Response(EC2Response):
    """moto's EC2 with bundle tasks and instance-store images."""

    def setup_class(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 (those of moto)
        """Read a request; see moto's BaseResponse."""
        super().setup_class(*arguments, **options)
        add_windows_image(self.ec2_backend)

    def bundle_instance(self) -> tuple[int, dict[str, str], str]:
        """BundleInstance."""
        return self._handle()

    def describe_bundle_tasks(self) -> tuple[int, dict[str, str], str]:
        """DescribeBundleTasks."""
        return self._handle()

    def cancel_bundle_task(self) -> tuple[int, dict[str, str], str]:
        """CancelBundleTask."""
        return self._handle()

    def register_image(self) -> ActionResult:
        """RegisterImage: of a bundle if there is an ImageLocation; otherwise as moto does it."""
        location = self._get_param("ImageLocation")
        if not location:
            return super().register_image()
        self.error_on_dryrun()
        image = register_bundle(
            self.ec2_backend,
            self._buckets,
            _settings().identity,
            location=location,
            name=self._get_param("Name"),
            description=self._get_param("Description", ""),
        )
        return ActionResult({"ImageId": image.id})

    def describe_images(self) -> ActionResult:
        """DescribeImages, also with the filters that moto does not have."""
        filters = self._get_param("Filters", [])
        own = [given for given in filters if given.get("Name") in FILTERS]
        if not own:
            return super().describe_images()
        self.params["Filters"] = [given for given in filters if given not in own]
        result = super().describe_images()
        result.result["Images"] = [image for image in result.result["Images"] if _matches(image, own)]
        return result

    def run_instances(self) -> ActionResult:
        """RunInstances. An instance of an instance-store image has no EBS root volume."""
        result = super().run_instances()
        for instance in result.result.instances:
            image = self.ec2_backend.amis.get(instance.image_id)
            if image is not None and image.root_device_type == "instance-store":
                instance.root_device_type = "instance-store"
                root = instance.block_device_mapping.pop(instance.root_device_name, None)
                if root is not None:
                    self.ec2_backend.volumes.pop(root.volume_id, None)
        return result

    @property
    def _buckets(self) -> MotoBuckets:
        return MotoBuckets(self.region, self.partition)

    def _handle(self) -> tuple[int, dict[str, str], str]:
        """Handle the request with Thrave's code."""
        settings = _settings()
        keys = MotoKeys(self.current_account, settings.known_keys)
        form = {name: values[0] for name, values in self.querystring.items()}
        request = Ec2Request(
            method="POST", path="/", query=b"", headers=(("host", self.parsed_url.netloc),),
            body=urlencode(form).encode(),
        )  # fmt: skip
        caller = AccessKey(
            access_key_id=self.access_key,
            secret_access_key="",  # moto has authenticated the request
            account_id=self.current_account,
            status="Active",
            create_date=settings.identity.certificate.not_valid_before_utc,
        )
        request_id = str(uuid.UUID(bytes=random_bytes(16), version=4))
        status = 200
        with settings.lock:
            try:
                body = handle_request(self._backend(settings, keys), request, caller, request_id)
            except EC2Error as error:
                status = error.status
                body = error_document(EC2.model, error.code, error.message, status=status, request_id=request_id)
        return status, {"status": str(status), "Content-Type": "text/xml;charset=UTF-8"}, body.decode()

    def _backend(self, settings: _Installation, keys: MotoKeys) -> Ec2Backend:
        """Return what the actions use, with moto's instances, buckets and keys."""
        instances, buckets = MotoInstances(self.ec2_backend), self._buckets

        def new_task(task: BundleTask, request: BundleRequest) -> MotoBundleTask:
            certificate = keys.certificate(task.owner_id)
            return MotoBundleTask(
                task,
                request,
                instances=instances,
                buckets=buckets,
                identity=settings.identity,
                certificate=None if certificate is None else load_certificate(certificate),
            )

        if not hasattr(self.ec2_backend, _TASKS):
            setattr(self.ec2_backend, _TASKS, MotoTasks(new_task))
        return Ec2Backend(
            accounts=cast("Accounts", keys),
            instances=instances,
            buckets=buckets,
            tasks=cast("BundleTaskService", getattr(self.ec2_backend, _TASKS)),
            power=cast("PowerControl", None),  # no action here uses it
            rate=RateLimit(_REQUESTS_PER_SECOND, _REQUESTS_PER_SECOND),
            region=self.region,
            is_allowed=lambda _caller, _action, _resource: True,  # moto has decided
        )
