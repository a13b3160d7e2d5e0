"""The storage that BundleInstance is given: bucket, prefix, and the upload policy that its owner signed.

The key named `AWSAccessKeyId` belongs to the bucket's owner, who need not be the caller. Its secret proves the upload
policy, over the base64 text as received. Nothing is written before the policy is proved, and nothing ever to a bucket
that belongs to somebody else.

Source of the messages: Eucalyptus 4.4, Bundles.java and VmControl.bundleInstance; AWS's own are not known.
"""

import secrets
from dataclasses import dataclass, field, replace

from thrave.buckets.base import UNKNOWN_OWNER, check_bucket_name, split_prefix
from thrave.buckets.errors import BucketAlreadyExists, BucketError, Kind, SignatureDoesNotMatch, WrongRegion
from thrave.buckets.upload_policy import POLICY_CHARACTERS, UploadPolicy
from thrave.ec2.door import Caller, Door
from thrave.ec2.errors import EC2Error
from thrave.ec2.protocol import Parameters
from thrave.tasks.bundle_location import BundleLocation

# Checked with in place of the secret of a key that is unknown or inactive, so that the work is the same.
_NOBODYS_SECRET = secrets.token_urlsafe(30)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where a bundle is to go, and by whose leave.

    Attributes:
        bucket: Its name; a new one is created for the owner.
        prefix: The beginning of every object's key.
        access_key_id: A key of the bucket's owner.
        upload_policy: Base64 text, exactly as received.
        upload_policy_signature: Base64 text, made with the secret of that key.
    """

    bucket: str
    prefix: str
    access_key_id: str
    upload_policy: str = field(repr=False)
    upload_policy_signature: str = field(repr=False)

    @classmethod
    def of(cls, s3: Parameters) -> "Storage":
        """Read the members of `Storage.S3`, all of them present.

        Raises:
            EC2Error: InvalidParameterValue: no bucket or bundle can have such a name, or the policy is too long.
        """
        _check_names(s3["Bucket"], s3["Prefix"])
        if len(s3["UploadPolicy"].text) > POLICY_CHARACTERS:
            raise EC2Error("InvalidParameterValue", "Value for parameter UploadPolicy is invalid (too long)")
        return cls(
            bucket=s3["Bucket"],
            prefix=s3["Prefix"],
            access_key_id=s3["AWSAccessKeyId"],
            upload_policy=s3["UploadPolicy"].text,
            upload_policy_signature=s3["UploadPolicySignature"],
        )


def _check_names(bucket: str, prefix: str) -> None:
    for name, value, check in (("Bucket", bucket, check_bucket_name), ("Prefix", prefix, split_prefix)):
        try:
            check(value)
        except BucketError as error:
            message = f"Value ({value}) for parameter {name} is invalid. {error.message}"
            raise EC2Error("InvalidParameterValue", message) from None


def check_upload_policy(door: Door, caller: Caller, storage: Storage) -> tuple[str, UploadPolicy]:
    """Prove that the bucket's owner allows a whole bundle to be uploaded; give the owner's account id, and the policy.

    Raises:
        EC2Error: InvalidParameterValue: the key is unknown, has not signed the policy, or is a user's who may not put
            the bundle's objects; or the policy could never be met, then in S3's own words.
    """
    key = door.accounts.find_key(storage.access_key_id)
    signer = key if key is not None and key.status == "Active" else None
    try:
        policy = UploadPolicy.verify(
            storage.upload_policy,
            storage.upload_policy_signature,
            access_key_id=storage.access_key_id,
            secret=_NOBODYS_SECRET if signer is None else signer.secret_access_key,
        )
        policy.check_bundle(storage.bucket, storage.prefix, now=door.now())
    except SignatureDoesNotMatch:  # one answer, after the same work, or callers could test which keys exist
        raise EC2Error("InvalidParameterValue", _not_signed(storage)) from None
    except BucketError as error:
        raise EC2Error("InvalidParameterValue", f"Value for UploadPolicy is invalid. {error.message}") from None
    if signer is None:
        raise EC2Error("InvalidParameterValue", _not_signed(storage))
    owner = replace(caller, account_id=signer.account_id, access_key_id=signer.access_key_id, user=signer.user)
    if not all(door.may(owner, "s3:PutObject", arn) for arn in _objects(storage)):
        raise EC2Error("InvalidParameterValue", "Value for UploadPolicy is invalid. Its signer may not s3:PutObject.")
    return signer.account_id, policy


def _not_signed(storage: Storage) -> str:
    return (
        "Value for UploadPolicySignature is invalid. No active access key with the id "
        f"{storage.access_key_id} (AWSAccessKeyId) has signed this UploadPolicy."
    )


def _objects(storage: Storage) -> list[str]:
    """The ARNs of a bundle's objects, one part for all of them."""
    endings = (".part.0", ".manifest.xml", ".manifest.json")
    return [f"arn:aws:s3:::{storage.bucket}/{storage.prefix}{ending}" for ending in endings]


def check_bucket(door: Door, storage: Storage, owner_id: str) -> None:
    """Refuse, as `claim_bucket` does, a bucket that is known to be somebody else's. Creates nothing.

    Raises:
        EC2Error: As `claim_bucket`.
    """
    try:
        owner = door.buckets.on_behalf_of(storage.access_key_id).owner(storage.bucket)
    except BucketError as error:
        raise _refusal(error, storage) from None
    if owner not in {None, UNKNOWN_OWNER, owner_id}:
        raise EC2Error("InaccessibleStorageLocation", bucket=storage.bucket, access_key_id=storage.access_key_id)


def claim_bucket(door: Door, storage: Storage, owner_id: str) -> bool:
    """Make sure that the bucket exists and is its owner's, and create it if it does not exist; say whether it was.

    Raises:
        EC2Error: InaccessibleStorageLocation: it belongs to somebody else or is in another region, or the store, or the
            service's own key for it, does not allow what is needed. InvalidParameterValue: the store refuses the name,
            or the access key. Unavailable: the store fails, or does not respond; a later attempt may succeed.
    """
    try:
        buckets = door.buckets.on_behalf_of(storage.access_key_id)
        return buckets.create(storage.bucket, owner_id, probe=f"{storage.prefix}.probe")
    except BucketAlreadyExists:
        where = {"bucket": storage.bucket, "access_key_id": storage.access_key_id}
        raise EC2Error("InaccessibleStorageLocation", **where) from None
    except BucketError as error:
        raise _refusal(error, storage) from None


def check_prefix(door: Door, storage: Storage) -> None:
    """Refuse a prefix under which the bucket has a bundle, if the operator does not have it replaced.

    Raises:
        EC2Error: InvalidParameterValue: there is a manifest. Else as `claim_bucket`.
    """
    if door.existing_bundle == "replace":
        return
    place = BundleLocation(storage.bucket, *split_prefix(storage.prefix))
    try:
        found = place.has_bundle(door.buckets.on_behalf_of(storage.access_key_id))
    except BucketError as error:
        raise _refusal(error, storage) from None
    if found:
        message = (
            f"Bucket prefix in use {storage.bucket}/{storage.prefix}: the bucket has the bundle "
            f"'{place.manifest_key}'. Choose another Prefix, or remove that bundle (thrave delete "
            f's3://{storage.bucket}/{place.manifest_key}). The operator: existing_bundle = "replace" has it replaced.'
        )
        raise EC2Error("InvalidParameterValue", message)


def _refusal(error: BucketError, storage: Storage) -> EC2Error:
    """What a caller is told of an error of the store: only who must act is named, and what they can do."""
    if error.kind is Kind.TRANSIENT:
        return EC2Error("Unavailable", said=error)
    if isinstance(error, WrongRegion):
        message = (
            f"The bucket '{storage.bucket}' is in another region than this service stores bundles in: {error}. "
            "Choose a bucket in the service's region; or have the operator change s3_region and s3_endpoint."
        )
        return EC2Error("InaccessibleStorageLocation", message)
    if error.kind is Kind.REQUEST:
        return EC2Error(
            "InvalidParameterValue", f"Value ({storage.bucket}) for parameter Bucket is invalid. {error} {error.remedy}"
        )
    if error.kind is Kind.KEY and error.access_key_id in (None, storage.access_key_id):
        message = (  # stores say of a key that they do not know the same as of one that may not
            f"Value ({storage.bucket}) for parameter Bucket is invalid. The store does not let the access key "
            f"{storage.access_key_id} use the bucket, or create it: {error}. Sign the upload policy with a key that "
            "the store knows (the operator: thrave account key import), of a user who may; or have the bucket created."
        )
        return EC2Error("InvalidParameterValue", message)
    whose = "The store refuses the service's own access key" if error.kind is Kind.KEY else "The store refuses"
    remedy = "See the setting s3_credentials_file. " if error.kind is Kind.KEY else ""
    return EC2Error(
        "InaccessibleStorageLocation",
        f"{whose} for the bucket '{storage.bucket}': {error}. The operator: {remedy}{error.remedy} (thrave doctor)",
    )
