"""The storage that BundleInstance is given: bucket, prefix, and the upload policy that its owner signed.

The key named `AWSAccessKeyId` belongs to the bucket's owner, who need not be the caller. Its secret proves the upload
policy, over the base64 text as received. Nothing is written before the policy is proved, and nothing ever to a bucket
that belongs to somebody else.

Source of the messages: Eucalyptus 4.4, Bundles.java and VmControl.bundleInstance; AWS's own are not known.

Actions on bundle tasks: BundleInstance, DescribeBundleTasks, CancelBundleTask.

BundleInstance makes every check that can be made at request time, in one fixed order, and changes nothing before the
last has passed. The work itself is done elsewhere (`thrave.tasks`); nothing here waits for it.
"""

import secrets
from dataclasses import dataclass, field, replace
from functools import partial

from thrave.buckets.base import UNKNOWN_OWNER, check_bucket_name, split_prefix
from thrave.buckets.errors import BucketAlreadyExists, BucketError, Kind, SignatureDoesNotMatch, WrongRegion
from thrave.buckets.upload_policy import POLICY_CHARACTERS, UploadPolicy
from thrave.compute.instance import UNREADABLE_REASONS, Instance, InstanceState
from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, instants, select
from thrave.ec2.instance_actions import check_instance_id, get_own_instance
from thrave.ec2.protocol import Parameters, Result
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.errors import (
    BundleTaskNotCancellable,
    BundleTaskNotFound,
    BundlingInProgress,
    PrefixInUse,
    TooManyBundleTasks,
)
from thrave.tasks.models import BundleRequest, BundleTask, BundleTaskState
from thrave.tasks.object_removal import BucketBusyError

# Checked with in place of the secret of a key that is unknown or inactive, so that the work is the same.
_NOBODYS_SECRET = secrets.token_urlsafe(30)


@dataclass(frozen=True, kw_only=True)
class S3Storage:
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
    def of(cls, s3: Parameters) -> "S3Storage":
        """Read the members of `S3Storage.S3`, all of them present.

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


def check_upload_policy(backend: Ec2Backend, caller: Caller, storage: S3Storage) -> tuple[str, UploadPolicy]:
    """Prove that the bucket's owner allows a whole bundle to be uploaded; give the owner's account id, and the policy.

    Raises:
        EC2Error: InvalidParameterValue: the key is unknown, has not signed the policy, or is a user's who may not put
            the bundle's objects; or the policy could never be met, then in S3's own words.
    """
    key = backend.accounts.find_key(storage.access_key_id)
    signer = key if key is not None and key.status == "Active" else None
    try:
        policy = UploadPolicy.verify(
            storage.upload_policy,
            storage.upload_policy_signature,
            access_key_id=storage.access_key_id,
            secret=_NOBODYS_SECRET if signer is None else signer.secret_access_key,
        )
        policy.check_bundle(storage.bucket, storage.prefix, now=backend.now())
    except SignatureDoesNotMatch:  # one answer, after the same work, or callers could test which keys exist
        raise EC2Error("InvalidParameterValue", _not_signed(storage)) from None
    except BucketError as error:
        raise EC2Error("InvalidParameterValue", f"Value for UploadPolicy is invalid. {error.message}") from None
    if signer is None:
        raise EC2Error("InvalidParameterValue", _not_signed(storage))
    owner = replace(caller, account_id=signer.account_id, access_key_id=signer.access_key_id, user=signer.user)
    if not all(backend.is_allowed(owner, "s3:PutObject", arn) for arn in _objects(storage)):
        raise EC2Error("InvalidParameterValue", "Value for UploadPolicy is invalid. Its signer may not s3:PutObject.")
    return signer.account_id, policy


def _not_signed(storage: S3Storage) -> str:
    return (
        "Value for UploadPolicySignature is invalid. No active access key with the id "
        f"{storage.access_key_id} (AWSAccessKeyId) has signed this UploadPolicy."
    )


def _objects(storage: S3Storage) -> list[str]:
    """The ARNs of a bundle's objects, one part for all of them."""
    endings = (".part.0", ".manifest.xml", ".manifest.json")
    return [f"arn:aws:s3:::{storage.bucket}/{storage.prefix}{ending}" for ending in endings]


def check_bucket(backend: Ec2Backend, storage: S3Storage, owner_id: str) -> None:
    """Refuse, as `claim_bucket` does, a bucket that is known to be somebody else's. Creates nothing.

    Raises:
        EC2Error: As `claim_bucket`.
    """
    try:
        owner = backend.buckets.on_behalf_of(storage.access_key_id).owner(storage.bucket)
    except BucketError as error:
        raise _refusal(error, storage) from None
    if owner not in {None, UNKNOWN_OWNER, owner_id}:
        raise EC2Error("InaccessibleStorageLocation", bucket=storage.bucket, access_key_id=storage.access_key_id)


def ensure_bucket(backend: Ec2Backend, storage: S3Storage, owner_id: str) -> bool:
    """Make sure that the bucket exists and is its owner's, and create it if it does not exist; say whether it was.

    Raises:
        EC2Error: InaccessibleStorageLocation: it belongs to somebody else or is in another region, or the store, or the
            service's own key for it, does not allow what is needed. InvalidParameterValue: the store refuses the name,
            or the access key. Unavailable: the store fails, or does not respond; a later attempt may succeed.
    """
    try:
        buckets = backend.buckets.on_behalf_of(storage.access_key_id)
        return buckets.create(storage.bucket, owner_id, probe=f"{storage.prefix}.probe")
    except BucketAlreadyExists:
        where = {"bucket": storage.bucket, "access_key_id": storage.access_key_id}
        raise EC2Error("InaccessibleStorageLocation", **where) from None
    except BucketError as error:
        raise _refusal(error, storage) from None


def check_prefix(backend: Ec2Backend, storage: S3Storage) -> None:
    """Refuse a prefix under which the bucket has a bundle, if the operator does not have it replaced.

    Raises:
        EC2Error: InvalidParameterValue: there is a manifest. Else as `claim_bucket`.
    """
    if backend.existing_bundle == "replace":
        return
    place = BundleLocation(storage.bucket, *split_prefix(storage.prefix))
    try:
        found = place.has_bundle(backend.buckets.on_behalf_of(storage.access_key_id))
    except BucketError as error:
        raise _refusal(error, storage) from None
    if found:
        message = (
            f"Bucket prefix in use {storage.bucket}/{storage.prefix}: the bucket has the bundle "
            f"'{place.manifest_key}'. Choose another Prefix, or remove that bundle (thrave delete "
            f's3://{storage.bucket}/{place.manifest_key}). The operator: existing_bundle = "replace" has it replaced.'
        )
        raise EC2Error("InvalidParameterValue", message)


def _refusal(error: BucketError, storage: S3Storage) -> EC2Error:
    """What a caller is told of an error of the store: only who must act is named, and what they can do."""
    if error.kind is Kind.TRANSIENT:
        return EC2Error("Unavailable", reason=error)
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


# A stopped instance is bundled as it is.
_BUNDLEABLE = frozenset({InstanceState.RUNNING, InstanceState.STOPPED})


FILTERS: FilterTable[BundleTask] = {
    "bundle-id": lambda task: [task.bundle_id],
    "error-code": lambda task: [task.error_code if _has_failed(task) else None],
    "error-message": lambda task: [task.error_message if _has_failed(task) else None],
    "instance-id": lambda task: [task.instance_id],
    "progress": lambda task: [_progress(task)],
    "s3-aws-access-key-id": lambda task: [task.access_key_id],  # in AWS's documentation of 2010-08-31
    "s3-bucket": lambda task: [task.bucket],
    "s3-prefix": lambda task: [task.prefix],
    "start-time": lambda task: instants(task.start_time),
    "state": lambda task: _spellings(task.state),
    "update-time": lambda task: instants(task.update_time),
}


def bundle_instance(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Have the root volume of an instance bundled into a bucket.

    Raises:
        EC2Error: By what is wrong, in this order: InvalidInstanceID.Malformed and InvalidParameterValue (syntax),
            InvalidInstanceID.NotFound, InvalidInstanceType, BundlingInProgress, IncorrectInstanceState,
            InvalidParameterValue (upload policy), ResourceLimitExceeded, InvalidParameterValue (another task goes to
            the prefix), IncorrectInstanceState (its volume), Unavailable, InaccessibleStorageLocation,
            InvalidParameterValue (the prefix has a bundle).
    """
    request = _checked(backend, caller, parameters)
    return _claim_and_create(backend, S3Storage.of(parameters["Storage"]["S3"]), request)


def check_bundle_instance(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> None:
    """Make the checks of BundleInstance for DryRun, and change nothing.

    Raises:
        EC2Error: As `bundle_instance`.
    """
    request, storage = _checked(backend, caller, parameters), S3Storage.of(parameters["Storage"]["S3"])
    check_bucket(backend, storage, request.owner_id)
    check_prefix(backend, storage)


def _checked(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> BundleRequest:
    """Make every check but the bucket's, in their order; return what is to be recorded."""
    check_instance_id(parameters["InstanceId"])
    storage = S3Storage.of(parameters["Storage"]["S3"])
    instance = get_own_instance(backend, caller, parameters["InstanceId"])
    _check_kind(backend, instance)
    _check_idle(backend, instance)
    _check_state(instance)
    owner_id, policy = check_upload_policy(backend, caller, storage)
    _check_number(backend, caller)
    _check_place(backend, caller, instance, storage)
    _check_service(backend, instance)
    return BundleRequest(
        account_id=caller.account_id,
        owner_id=owner_id,
        instance_id=instance.instance_id,
        bucket=storage.bucket,
        prefix=storage.prefix,
        access_key_id=storage.access_key_id,
        upload_policy=policy.text,
        upload_policy_signature=policy.signature,
    )


def describe_bundle_tasks(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Describe the caller's bundle tasks, or those with the given ids, as far as the filters let them through.

    Raises:
        EC2Error: InvalidBundleID.NotFound, and what filters raise.
    """
    try:
        tasks = backend.tasks.describe(caller.account_id, parameters.get("BundleIds", ()))
    except BundleTaskNotFound as error:
        raise EC2Error("InvalidBundleID.NotFound", bundle_id=error.bundle_id) from None
    chosen = select(tasks, parameters.get("Filters", ()), FILTERS, partial(backend.charge, caller))
    return {"BundleTasks": [to_response(task) for task in chosen]}


def cancel_bundle_task(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Have a bundle task of the caller's cancelled: it ends as `failed` with `Client.Cancelled`.

    Raises:
        EC2Error: InvalidBundleID.NotFound, IncorrectState.
    """
    bundle_id = parameters["BundleId"]
    try:
        return {"BundleTask": to_response(backend.tasks.cancel(caller.account_id, bundle_id))}
    except BundleTaskNotFound:
        raise EC2Error("InvalidBundleID.NotFound", bundle_id=bundle_id) from None
    except BundleTaskNotCancellable as error:
        raise EC2Error("IncorrectState", bundle_id=bundle_id, state=error.state) from None


def _check_kind(backend: Ec2Backend, instance: Instance) -> None:
    if instance.root_device_type != "instance-store" or not (instance.platform == "windows" or backend.any_platform):
        raise EC2Error("InvalidInstanceType")


def _check_idle(backend: Ec2Backend, instance: Instance) -> None:
    """Before the state is looked at: a task has its instance stopped, and a repeated call must hear of the task."""
    task = backend.tasks.in_progress(instance.instance_id)
    if task is not None:
        raise EC2Error("BundlingInProgress", bundle_id=task.bundle_id)


def _check_state(instance: Instance) -> None:
    why = None if instance.off_reason is None else UNREADABLE_REASONS.get(instance.off_reason)
    if instance.state not in _BUNDLEABLE:
        why = f"it is {instance.state}"
    if why is not None:
        raise EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, change="bundled", reason=why)


def _check_number(backend: Ec2Backend, caller: Caller) -> None:
    """Before a bucket is made; `create` looks again, at once with every other request."""
    try:
        backend.tasks.check_quota(caller.account_id)
    except TooManyBundleTasks as error:
        raise EC2Error("ResourceLimitExceeded", limit=error.limit) from None


def _check_place(backend: Ec2Backend, caller: Caller, instance: Instance, storage: S3Storage) -> None:
    """Before a bucket is made; the database itself refuses a second task, whoever sends it at the same time."""
    try:
        backend.tasks.check_location(caller.account_id, instance.instance_id, storage.bucket, storage.prefix)
    except BundlingInProgress as error:  # another call was quicker since we looked
        raise EC2Error("BundlingInProgress", bundle_id=error.bundle_id) from None
    except PrefixInUse as error:
        raise EC2Error("InvalidParameterValue", str(error)) from None


def _check_service(backend: Ec2Backend, instance: Instance) -> None:
    """Refuse what is known to fail, before anything is stopped for it.

    A volume does not come back while a caller tries again, so that 400 is the answer; a store may, and then the retries
    that SDKs make upon 503 cost nothing: while its trouble stands they are answered from memory.
    """
    said = backend.volume_problem(instance)
    if said is not None:
        why = f"{said}; the operator: thrave doctor"
        raise EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, change="bundled", reason=why)
    trouble = backend.store_problem()
    if trouble is not None:
        raise EC2Error("Unavailable", reason=f"{trouble} (the operator: thrave doctor)")


def _claim_and_create(backend: Ec2Backend, storage: S3Storage, request: BundleRequest) -> Result:
    """Claim the bucket and record the task; if the task is refused, remove the bucket that was created for it."""
    made = False
    made_buckets = backend.tasks.made_buckets
    try:
        with made_buckets.in_use(storage.bucket):
            made = ensure_bucket(backend, storage, request.owner_id)
            if not made:
                check_prefix(backend, storage)
            return _create(backend, replace(request, made_bucket=made))
    except BucketBusyError:
        raise EC2Error("Unavailable", reason=f"the bucket '{storage.bucket}' is being removed") from None
    except Exception:
        if made:
            made_buckets.remove(backend.buckets.on_behalf_of(storage.access_key_id), storage.bucket, request.owner_id)
        raise


def _create(backend: Ec2Backend, request: BundleRequest) -> Result:
    try:
        return {"BundleTask": to_response(backend.tasks.create(request))}
    except BundlingInProgress as error:  # another call was quicker since we looked
        raise EC2Error("BundlingInProgress", bundle_id=error.bundle_id) from None
    except PrefixInUse as error:
        raise EC2Error("InvalidParameterValue", str(error)) from None
    except TooManyBundleTasks as error:
        raise EC2Error("ResourceLimitExceeded", limit=error.limit) from None


def to_response(task: BundleTask) -> Result:
    """Give a task as its owner may see it: of the storage only bucket and prefix, as AWS echoes it."""
    error = {"Code": task.error_code, "Message": task.error_message} if _has_failed(task) else None
    return {
        "InstanceId": task.instance_id,
        "BundleId": task.bundle_id,
        "State": task.state,
        "StartTime": task.start_time,
        "UpdateTime": task.update_time,
        "Storage": {"S3": {"Bucket": task.bucket, "Prefix": task.prefix}},
        "Progress": _progress(task),
        "BundleTaskError": error,
    }


def _has_failed(task: BundleTask) -> bool:
    """Whether its error is shown: it is recorded before the task is undone, and shown when that is done."""
    return task.state is BundleTaskState.FAILED


def _progress(task: BundleTask) -> str | None:
    return None if task.progress is None else f"{task.progress}%"


def _spellings(state: BundleTaskState) -> tuple[str, ...]:
    """Give a state as a filter may name it: AWS's documentation prints `canceling`, AWS and its model `cancelling`."""
    return (state, "canceling") if state is BundleTaskState.CANCELLING else (state,)
