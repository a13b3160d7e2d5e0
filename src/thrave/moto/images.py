"""Instance-store images in moto: an image of Windows that exists from the start, and images of bundles."""

from typing import Any

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models.amis import Ami
from moto.ec2.utils import random_ami_id

from thrave.buckets.errors import BucketError, NoSuchKey
from thrave.bundle import BundleError, PartMissingError, verify_bundle
from thrave.bundle.model import PART_SIZE
from thrave.bundle.verifier import VerifyResult
from thrave.identity.certificates import ServiceIdentity
from thrave.moto.adapters import MotoBuckets

WINDOWS_IMAGE_ID = "ami-00000000000077696"
"""An instance-store image of Windows. Every region has it, since moto's own images have an EBS root volume."""

FILTERS = {"manifest-location": "image_location", "root-device-type": "root_device_type"}
"""Filters of DescribeImages that moto does not have, with the attributes that they compare."""

_MANIFEST_ENDING = ".manifest.xml"


class InstanceStoreAmi(Ami):
    """An image whose root volume is on the instance store; it has no snapshot."""

    def __init__(self, ec2: Any, ami_id: str, **attributes: Any) -> None:  # noqa: ANN401 (those of moto's Ami)
        super().__init__(ec2, ami_id, root_device_type="instance-store", boot_mode="legacy-bios", **attributes)
        ec2.snapshots.pop(self.ebs_snapshot.id)

    @property
    def block_device_mappings(self) -> list[dict[str, Any]]:
        """No EBS volumes."""
        return []


def add_windows_image(ec2: Any) -> None:  # noqa: ANN401 (moto's EC2Backend)
    """Add the image of Windows to a region, unless it has it or has lost it by DeregisterImage."""
    if WINDOWS_IMAGE_ID not in ec2.amis and WINDOWS_IMAGE_ID not in ec2.deleted_amis:
        ec2.amis[WINDOWS_IMAGE_ID] = InstanceStoreAmi(
            ec2,
            WINDOWS_IMAGE_ID,
            name="thrave-windows-instance-store",
            description="Windows with a root volume on the instance store, for BundleInstance",
            owner_id="801119661308",  # Amazon's account for Windows images, as in moto's own list
            owner_alias="amazon",
            public=True,
            platform="windows",
            architecture="x86_64",
            virtualization_type="hvm",
            hypervisor="xen",
            image_location="amazon/thrave-windows-instance-store",
        )


def register_bundle(
    ec2: Any,  # noqa: ANN401 (moto's EC2Backend)
    buckets: MotoBuckets,
    identity: ServiceIdentity,
    *,
    location: str,
    name: str,
    description: str,
) -> InstanceStoreAmi:
    """Register the bundle at `BUCKET/PREFIX.manifest.xml` as an image, after the whole bundle was verified.

    Raises:
        EC2ClientError: InvalidManifest: there is no bundle, or it is damaged or was not made for this service.
            InvalidAMIName.Duplicate.
    """
    if any(image.name == name and image.owner_id == ec2.account_id for image in ec2.amis.values()):
        raise EC2ClientError("InvalidAMIName.Duplicate", f"AMI name {name} is already in use by this account.")
    bucket, _, key = location.strip("/").partition("/")
    if not key.endswith(_MANIFEST_ENDING):
        raise _invalid(f"The location {location} is not BUCKET/PREFIX{_MANIFEST_ENDING}.")
    folder, _, _ = key.rpartition("/")
    parts = _BucketParts(buckets, bucket, f"{folder}/" if folder else "")
    try:
        verified = _verify(buckets.get(bucket, key), parts, identity)
    except BucketError as error:
        raise _invalid(f"HTTP {error.status} response for {location}: {error}") from None
    except BundleError as error:
        raise _invalid(f"Invalid AMI manifest {location}: {error}") from None
    image = InstanceStoreAmi(
        ec2,
        random_ami_id(),
        name=name,
        description=description,
        platform="windows",  # EC2 bundles only Windows
        architecture=verified.manifest.architecture,
        virtualization_type="hvm",
        hypervisor="xen",
        image_location=f"{bucket}/{key}",
    )
    ec2.amis[image.id] = image
    return image


def _verify(manifest: bytes, parts: "_BucketParts", identity: ServiceIdentity) -> VerifyResult:
    return verify_bundle(manifest, parts, identity.private_key, certificate=identity.certificate)


def _invalid(message: str) -> EC2ClientError:
    return EC2ClientError("InvalidManifest", message)


class _BucketParts:
    """The parts of a bundle in a bucket. A `PartSource`."""

    def __init__(self, buckets: MotoBuckets, bucket: str, folder: str) -> None:
        self._buckets, self._bucket, self._folder = buckets, bucket, folder

    def read(self, filename: str) -> bytes:
        try:
            return self._buckets.get_range(self._bucket, self._folder + filename, 0, PART_SIZE + 1)
        except NoSuchKey as error:
            raise PartMissingError(filename, str(error)) from None
