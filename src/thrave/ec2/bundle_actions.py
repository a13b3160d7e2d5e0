"""Actions on bundle tasks: BundleInstance, DescribeBundleTasks, CancelBundleTask.

BundleInstance makes every check that is possible at request time, in one fixed order, and changes nothing before all
checks have passed. The bundling itself is done by a task (`thrave.tasks`); no action waits for it.

Source of the messages: Eucalyptus 4.4, Bundles.java and VmControl.bundleInstance; AWS's own are not known.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from thrave.buckets.base import UNKNOWN_OWNER, check_bucket_name, split_prefix
from thrave.buckets.errors import BucketAlreadyExists, BucketError, Kind, SignatureDoesNotMatch, WrongRegion
from thrave.buckets.upload_policy import POLICY_CHARACTERS, UploadPolicy
from thrave.compute.instance import UNREADABLE_REASONS, Instance, InstanceState
from thrave.concurrency import random_hex
from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, format_instant, select
from thrave.ec2.instance_actions import check_instance_id, get_own_instance
from thrave.ec2.protocol import Parameters, Result
from thrave.health import STORE
from thrave.tasks.bundle_location import BundleLocation
from thrave.tasks.created_buckets import BucketBusyError
from thrave.tasks.errors import (
    BundleTaskNotCancellable,
    BundleTaskNotFound,
    BundlingInProgress,
    PrefixInUse,
    TooManyBundleTasks,
)
from thrave.tasks.models import BundleRequest, BundleTask, BundleTaskState

FILTERS: FilterTable[BundleTask] = {
    "bundle-id": lambda task: [task.bundle_id],
    "error-code": lambda task: [task.error_code if _has_failed(task) else None],
    "error-message": lambda task: [task.error_message if _has_failed(task) else None],
    "instance-id": lambda task: [task.instance_id],
    "progress": lambda task: [_format_progress(task)],
    "s3-aws-access-key-id": lambda task: [task.access_key_id],  # in AWS's documentation of 2010-08-31
    "s3-bucket": lambda task: [task.bucket],
    "s3-prefix": lambda task: [task.prefix],
    "start-time": lambda task: format_instant(task.start_time),
    # AWS's documentation prints `canceling`; AWS and its model use `cancelling`.
    "state": lambda task: (task.state, "canceling") if task.state is BundleTaskState.CANCELLING else (task.state,),
    "update-time": lambda task: format_instant(task.update_time),
}

# A stopped instance is bundled without being started.
_BUNDLEABLE = frozenset({InstanceState.RUNNING, InstanceState.STOPPED})

# Used instead of the secret of a key that is unknown or inactive, so that the work is the same.
_DUMMY_SECRET = random_hex(20)


def bundle_instance(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Create a task that bundles the root volume of an instance into a bucket.

    Raises:
        EC2Error: In this order: InvalidInstanceID.Malformed and InvalidParameterValue (syntax),
            InvalidInstanceID.NotFound, InvalidInstanceType, BundlingInProgress, IncorrectInstanceState,
            InvalidParameterValue (upload policy), ResourceLimitExceeded, InvalidParameterValue (another task uses the
            prefix), IncorrectInstanceState (the volume), Unavailable, InaccessibleStorageLocation,
            InvalidParameterValue (the prefix has a bundle).
    """
    request = _check_request(backend, caller, parameters)
    storage = S3Storage.from_parameters(parameters["Storage"]["S3"])
    is_created = False
    created_buckets = backend.tasks.created_buckets
    try:
        with created_buckets.in_use(storage.bucket):
            is_created = ensure_bucket(backend, storage, request.owner_id)
            if not is_created:
                check_prefix(backend, storage)
            return {"BundleTask": _create_task(backend, replace(request, created_bucket=is_created))}
    except BucketBusyError:
        raise EC2Error("Unavailable", reason=f"the bucket '{storage.bucket}' is being removed") from None
    except Exception:
        if is_created:  # for this task, which was refused
            created_buckets.remove(
                backend.buckets.on_behalf_of(storage.access_key_id), storage.bucket, request.owner_id
            )
        raise


def check_bundle_instance(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> None:
    """Make the checks of BundleInstance for DryRun, and change nothing.

    Raises:
        EC2Error: As `bundle_instance`.
    """
    request = _check_request(backend, caller, parameters)
    storage = S3Storage.from_parameters(parameters["Storage"]["S3"])
    check_bucket(backend, storage, request.owner_id)
    check_prefix(backend, storage)


def describe_bundle_tasks(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Describe the caller's bundle tasks, or those with the given ids, if they match the filters.

    Raises:
        EC2Error: InvalidBundleID.NotFound, and the errors of `select`.
    """
    try:
        tasks = backend.tasks.describe(caller.account_id, parameters.get("BundleIds", ()))
    except BundleTaskNotFound as error:
        raise EC2Error("InvalidBundleID.NotFound", bundle_id=error.bundle_id) from None
    selected = select(tasks, parameters.get("Filters", ()), FILTERS, partial(backend.charge, caller))
    return {"BundleTasks": [to_response(task) for task in selected]}


def cancel_bundle_task(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> Result:
    """Request the cancellation of a task, which then ends as `failed` with `Client.Cancelled`.

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


def to_response(task: BundleTask) -> Result:
    """Return a task in EC2's form. Like AWS's, it has bucket and prefix but not the rest of the storage."""
    error = {"Code": task.error_code, "Message": task.error_message} if _has_failed(task) else None
    return {
        "InstanceId": task.instance_id,
        "BundleId": task.bundle_id,
        "State": task.state,
        "StartTime": task.start_time,
        "UpdateTime": task.update_time,
        "Storage": {"S3": {"Bucket": task.bucket, "Prefix": task.prefix}},
        "Progress": _format_progress(task),
        "BundleTaskError": error,
    }


def _has_failed(task: BundleTask) -> bool:
    """Whether to show the error, which is recorded before the task is undone."""
    return task.state is BundleTaskState.FAILED


def _format_progress(task: BundleTask) -> str | None:
    return None if task.progress is None else f"{task.progress}%"


def _check_request(backend: Ec2Backend, caller: Caller, parameters: Parameters) -> BundleRequest:
    """Make all checks except those of the bucket, in their order; return the request to record."""
    check_instance_id(parameters["InstanceId"])
    storage = S3Storage.from_parameters(parameters["Storage"]["S3"])
    instance = get_own_instance(backend, caller, parameters["InstanceId"])
    if instance.root_device_type != "instance-store" or not (instance.platform == "windows" or backend.any_platform):
        raise EC2Error("InvalidInstanceType")
    # Before the state: a task stops its instance, and a repeated request must return the task's id.
    task = backend.tasks.in_progress(instance.instance_id)
    if task is not None:
        raise EC2Error("BundlingInProgress", bundle_id=task.bundle_id)
    _check_state(instance)
    owner_id, policy = check_upload_policy(backend, caller, storage)
    # Number and location are checked before a bucket is created. Two requests at the same time may both pass; `create`
    # and the database check again.
    try:
        backend.tasks.check_quota(caller.account_id)
        backend.tasks.check_location(caller.account_id, instance.instance_id, storage.bucket, storage.prefix)
    except (BundlingInProgress, PrefixInUse, TooManyBundleTasks) as error:
        raise _task_error(error) from None
    _check_known_problems(backend, instance)
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


def _check_state(instance: Instance) -> None:
    reason = None if instance.off_reason is None else UNREADABLE_REASONS.get(instance.off_reason)
    if instance.state not in _BUNDLEABLE:
        reason = f"it is {instance.state}"
    if reason is not None:
        raise EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, change="bundled", reason=reason)


def _check_known_problems(backend: Ec2Backend, instance: Instance) -> None:
    """Refuse a request that is known to fail, before its instance is stopped.

    A retry does not repair a volume, so the status is 400. A store may become available again, so the status is 503,
    which SDKs retry; these retries are cheap, since the result of the background probe is in memory.
    """
    problem = backend.find_volume_problem(instance)
    if problem is not None:
        reason = f"{problem}. The operator can run `thrave doctor`"
        raise EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, change="bundled", reason=reason)
    problem = backend.health.error(STORE)
    if problem is not None:
        raise EC2Error("Unavailable", reason=f"{problem.rstrip('.')}. The operator can run `thrave doctor`.")


def _create_task(backend: Ec2Backend, request: BundleRequest) -> Result:
    try:
        return to_response(backend.tasks.create(request))
    except (BundlingInProgress, PrefixInUse, TooManyBundleTasks) as error:
        raise _task_error(error) from None


def _task_error(error: BundlingInProgress | PrefixInUse | TooManyBundleTasks) -> EC2Error:
    match error:
        case BundlingInProgress():  # another request was faster
            return EC2Error("BundlingInProgress", bundle_id=error.bundle_id)
        case PrefixInUse():
            return EC2Error("InvalidParameterValue", str(error))
        case TooManyBundleTasks():
            return EC2Error("ResourceLimitExceeded", limit=error.limit)


@dataclass(frozen=True, kw_only=True)
class S3Storage:
    """The parameters `Storage.S3.…`: where the bundle is stored, and the upload policy that allows it.

    The access key belongs to the bucket's owner, who need not be the caller. Its secret verifies the upload policy's
    signature, which is made over the base64 text as received.

    Attributes:
        bucket: Bucket name; a missing bucket is created for the owner.
        prefix: Start of every object's key.
        access_key_id: An access key of the bucket's owner.
        upload_policy: Base64 text, exactly as received.
        upload_policy_signature: Base64 text, made with the secret of that key.
    """

    bucket: str
    prefix: str
    access_key_id: str
    upload_policy: str = field(repr=False)
    upload_policy_signature: str = field(repr=False)

    @classmethod
    def from_parameters(cls, s3: Parameters) -> "S3Storage":
        """Read `Storage.S3`, in which all members are present.

        Raises:
            EC2Error: InvalidParameterValue: bucket or prefix is not a valid name, or the policy is too long.
        """
        for name, check in (("Bucket", check_bucket_name), ("Prefix", split_prefix)):
            try:
                check(s3[name])
            except BucketError as error:
                message = f"Value ({s3[name]}) for parameter {name} is invalid. {error.message}"
                raise EC2Error("InvalidParameterValue", message) from None
        if len(s3["UploadPolicy"].text) > POLICY_CHARACTERS:
            raise EC2Error("InvalidParameterValue", "Value for parameter UploadPolicy is invalid (too long)")
        return cls(
            bucket=s3["Bucket"],
            prefix=s3["Prefix"],
            access_key_id=s3["AWSAccessKeyId"],
            upload_policy=s3["UploadPolicy"].text,
            upload_policy_signature=s3["UploadPolicySignature"],
        )


def check_upload_policy(backend: Ec2Backend, caller: Caller, storage: S3Storage) -> tuple[str, UploadPolicy]:
    """Check that the upload policy allows all objects of a bundle, and that its signer may allow it.

    Returns:
        The account id of the bucket's owner, and the policy.

    Raises:
        EC2Error: InvalidParameterValue: the key is unknown, did not sign the policy, or belongs to a user who may not
            put the bundle's objects; or no upload can meet the policy, with S3's message.
    """
    key = backend.accounts.find_key(storage.access_key_id)
    signer = key if key is not None and key.status == "Active" else None
    not_signed = EC2Error(
        "InvalidParameterValue",
        "Value for UploadPolicySignature is invalid. No active access key with the id "
        f"{storage.access_key_id} (AWSAccessKeyId) has signed this UploadPolicy.",
    )
    try:
        policy = UploadPolicy.verify(
            storage.upload_policy,
            storage.upload_policy_signature,
            access_key_id=storage.access_key_id,
            secret=_DUMMY_SECRET if signer is None else signer.secret_access_key,
        )
        policy.check_bundle(storage.bucket, storage.prefix, now=backend.now())
    except SignatureDoesNotMatch:  # same response and same work for an unknown key, or callers could test for keys
        raise not_signed from None
    except BucketError as error:
        raise EC2Error("InvalidParameterValue", f"Value for UploadPolicy is invalid. {error.message}") from None
    if signer is None:
        raise not_signed
    # The policies are the signer's. Their conditions are evaluated for this request: with the caller's address and TLS.
    owner = replace(caller, account_id=signer.account_id, access_key_id=signer.access_key_id, user=signer.user)
    # One part stands for all parts.
    for ending in (".part.0", ".manifest.xml", ".manifest.json"):
        location = f"{storage.bucket}/{storage.prefix}{ending}"
        if not backend.is_allowed(owner, "s3:PutObject", f"arn:aws:s3:::{location}"):
            message = f"Value for UploadPolicy is invalid. Its signer has no permission s3:PutObject on {location}."
            raise EC2Error("InvalidParameterValue", message)
    return signer.account_id, policy


def check_bucket(backend: Ec2Backend, storage: S3Storage, owner_id: str) -> None:
    """Refuse a bucket that is known to belong to another account, as `ensure_bucket` does, but create nothing.

    Raises:
        EC2Error: As `ensure_bucket`.
    """
    try:
        owner = backend.buckets.on_behalf_of(storage.access_key_id).owner(storage.bucket)
    except BucketError as error:
        raise _store_error(error, storage) from None
    if owner not in {None, UNKNOWN_OWNER, owner_id}:
        raise EC2Error("InaccessibleStorageLocation", bucket=storage.bucket, access_key_id=storage.access_key_id)


def ensure_bucket(backend: Ec2Backend, storage: S3Storage, owner_id: str) -> bool:
    """Create the bucket if it does not exist; return whether it was created.

    Raises:
        EC2Error: InaccessibleStorageLocation: the bucket belongs to another account or is in another region, or the
            store or the service's own key does not allow a required operation. InvalidParameterValue: the store refuses
            the name or the access key. Unavailable: the store fails or does not respond; a retry may succeed.
    """
    try:
        buckets = backend.buckets.on_behalf_of(storage.access_key_id)
        return buckets.create(storage.bucket, owner_id, probe=f"{storage.prefix}.probe")
    except BucketAlreadyExists:
        fields = {"bucket": storage.bucket, "access_key_id": storage.access_key_id}
        raise EC2Error("InaccessibleStorageLocation", **fields) from None
    except BucketError as error:
        raise _store_error(error, storage) from None


def check_prefix(backend: Ec2Backend, storage: S3Storage) -> None:
    """Refuse a prefix that already has a bundle, unless the setting `existing_bundle` is `replace`.

    Raises:
        EC2Error: InvalidParameterValue: there is a manifest. Otherwise as `ensure_bucket`.
    """
    if backend.existing_bundle == "replace":
        return
    location = BundleLocation(storage.bucket, *split_prefix(storage.prefix))
    try:
        has_bundle = location.has_bundle(backend.buckets.on_behalf_of(storage.access_key_id))
    except BucketError as error:
        raise _store_error(error, storage) from None
    if has_bundle:
        message = (
            f"Bucket prefix in use {storage.bucket}/{storage.prefix}: the bucket has the bundle "
            f"'{location.manifest_key}'. Choose another Prefix, or remove that bundle (thrave delete "
            f"s3://{storage.bucket}/{location.manifest_key}). "
            'The operator can allow requests to replace bundles: existing_bundle = "replace".'
        )
        raise EC2Error("InvalidParameterValue", message)


def _store_error(error: BucketError, storage: S3Storage) -> EC2Error:
    """Return the EC2 error for an error of the store. The message names who must act, and how."""
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
        message = (  # stores return the same error for an unknown key and for a key without the permission
            f"Value ({storage.bucket}) for parameter Bucket is invalid. The store does not allow the access key "
            f"{storage.access_key_id} to use or create the bucket: {error}. Sign the policy with a key that exists in "
            "the store and may use the bucket (operator: `thrave account key import`), or ask the owner to create the "
            "bucket."
        )
        return EC2Error("InvalidParameterValue", message)
    client = " for the service's own access key" if error.kind is Kind.KEY else ""
    remedy = "See the setting s3_credentials_file. " if error.kind is Kind.KEY else ""
    message = (
        f"The store refuses access to the bucket '{storage.bucket}'{client}: {error}. "
        f"For the operator: {remedy}{error.remedy} Run `thrave doctor` for details."
    )
    return EC2Error("InaccessibleStorageLocation", message)
