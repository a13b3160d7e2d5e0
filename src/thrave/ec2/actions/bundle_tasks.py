"""Actions on bundle tasks: BundleInstance, DescribeBundleTasks, CancelBundleTask.

BundleInstance makes every check that can be made at request time, in one fixed order, and changes nothing before the
last has passed. The work itself is done elsewhere (`thrave.tasks`); nothing here waits for it.
"""

from dataclasses import replace
from functools import partial

from thrave.compute.instance import NOT_TO_BE_READ, Instance, InstanceState
from thrave.ec2.actions.instances import check_instance_id, own_instance
from thrave.ec2.actions.storage import Storage, check_bucket, check_prefix, check_upload_policy, claim_bucket
from thrave.ec2.door import Caller, Door
from thrave.ec2.errors import EC2Error
from thrave.ec2.filters import FilterTable, instants, select
from thrave.ec2.protocol import Parameters, Result
from thrave.tasks.errors import (
    BundleTaskNotCancellable,
    BundleTaskNotFound,
    BundlingInProgress,
    PrefixInUse,
    TooManyBundleTasks,
)
from thrave.tasks.models import BundleRequest, BundleTask, BundleTaskState
from thrave.tasks.object_removal import BucketBusyError

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


def bundle_instance(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Have the root volume of an instance bundled into a bucket.

    Raises:
        EC2Error: By what is wrong, in this order: InvalidInstanceID.Malformed and InvalidParameterValue (syntax),
            InvalidInstanceID.NotFound, InvalidInstanceType, BundlingInProgress, IncorrectInstanceState,
            InvalidParameterValue (upload policy), ResourceLimitExceeded, InvalidParameterValue (another task goes to
            the prefix), IncorrectInstanceState (its volume), Unavailable, InaccessibleStorageLocation,
            InvalidParameterValue (the prefix has a bundle).
    """
    request = _checked(door, caller, parameters)
    return _claim_and_create(door, Storage.of(parameters["Storage"]["S3"]), request)


def check_bundle_instance(door: Door, caller: Caller, parameters: Parameters) -> None:
    """Make the checks of BundleInstance for DryRun, and change nothing.

    Raises:
        EC2Error: As `bundle_instance`.
    """
    request, storage = _checked(door, caller, parameters), Storage.of(parameters["Storage"]["S3"])
    check_bucket(door, storage, request.owner_id)
    check_prefix(door, storage)


def _checked(door: Door, caller: Caller, parameters: Parameters) -> BundleRequest:
    """Make every check but the bucket's, in their order; return what is to be recorded."""
    check_instance_id(parameters["InstanceId"])
    storage = Storage.of(parameters["Storage"]["S3"])
    instance = own_instance(door, caller, parameters["InstanceId"])
    _check_kind(door, instance)
    _check_idle(door, instance)
    _check_state(instance)
    owner_id, policy = check_upload_policy(door, caller, storage)
    _check_number(door, caller)
    _check_place(door, caller, instance, storage)
    _check_service(door, instance)
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


def describe_bundle_tasks(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Describe the caller's bundle tasks, or those with the given ids, as far as the filters let them through.

    Raises:
        EC2Error: InvalidBundleID.NotFound, and what filters raise.
    """
    try:
        tasks = door.tasks.describe(caller.account_id, parameters.get("BundleIds", ()))
    except BundleTaskNotFound as error:
        raise EC2Error("InvalidBundleID.NotFound", bundle_id=error.bundle_id) from None
    chosen = select(tasks, parameters.get("Filters", ()), FILTERS, partial(door.charge, caller))
    return {"BundleTasks": [_shown(task) for task in chosen]}


def cancel_bundle_task(door: Door, caller: Caller, parameters: Parameters) -> Result:
    """Have a bundle task of the caller's cancelled: it ends as `failed` with `Client.Cancelled`.

    Raises:
        EC2Error: InvalidBundleID.NotFound, IncorrectState.
    """
    bundle_id = parameters["BundleId"]
    try:
        return {"BundleTask": _shown(door.tasks.cancel(caller.account_id, bundle_id))}
    except BundleTaskNotFound:
        raise EC2Error("InvalidBundleID.NotFound", bundle_id=bundle_id) from None
    except BundleTaskNotCancellable as error:
        raise EC2Error("IncorrectState", bundle_id=bundle_id, state=error.state) from None


def _check_kind(door: Door, instance: Instance) -> None:
    if instance.root_device_type != "instance-store" or not (instance.platform == "windows" or door.any_platform):
        raise EC2Error("InvalidInstanceType")


def _check_idle(door: Door, instance: Instance) -> None:
    """Before the state is looked at: a task has its instance stopped, and a repeated call must hear of the task."""
    task = door.tasks.in_progress(instance.instance_id)
    if task is not None:
        raise EC2Error("BundlingInProgress", bundle_id=task.bundle_id)


def _check_state(instance: Instance) -> None:
    why = None if instance.off_reason is None else NOT_TO_BE_READ.get(instance.off_reason)
    if instance.state not in _BUNDLEABLE:
        why = f"it is {instance.state}"
    if why is not None:
        raise EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, done="bundled", why=why)


def _check_number(door: Door, caller: Caller) -> None:
    """Before a bucket is made; `create` looks again, at once with every other request."""
    try:
        door.tasks.check_number(caller.account_id)
    except TooManyBundleTasks as error:
        raise EC2Error("ResourceLimitExceeded", limit=error.limit) from None


def _check_place(door: Door, caller: Caller, instance: Instance, storage: Storage) -> None:
    """Before a bucket is made; the database itself refuses a second task, whoever sends it at the same time."""
    try:
        door.tasks.check_place(caller.account_id, instance.instance_id, storage.bucket, storage.prefix)
    except BundlingInProgress as error:  # another call was quicker since we looked
        raise EC2Error("BundlingInProgress", bundle_id=error.bundle_id) from None
    except PrefixInUse as error:
        raise EC2Error("InvalidParameterValue", str(error)) from None


def _check_service(door: Door, instance: Instance) -> None:
    """Refuse what is known to fail, before anything is stopped for it.

    A volume does not come back while a caller tries again, so that 400 is the answer; a store may, and then the retries
    that SDKs make upon 503 cost nothing: while its trouble stands they are answered from memory.
    """
    said = door.volume_trouble(instance)
    if said is not None:
        why = f"{said}; the operator: thrave doctor"
        raise EC2Error("IncorrectInstanceState", instance_id=instance.instance_id, done="bundled", why=why)
    trouble = door.store_trouble()
    if trouble is not None:
        raise EC2Error("Unavailable", said=f"{trouble} (the operator: thrave doctor)")


def _claim_and_create(door: Door, storage: Storage, request: BundleRequest) -> Result:
    """Claim the bucket and record the task; if the task is refused, remove the bucket that was created for it."""
    made = False
    made_buckets = door.tasks.made_buckets
    try:
        with made_buckets.claiming(storage.bucket):
            made = claim_bucket(door, storage, request.owner_id)
            if not made:
                check_prefix(door, storage)
            return _create(door, replace(request, made_bucket=made))
    except BucketBusyError:
        raise EC2Error("Unavailable", said=f"the bucket '{storage.bucket}' is being removed") from None
    except Exception:
        if made:
            made_buckets.discard(door.buckets.on_behalf_of(storage.access_key_id), storage.bucket, request.owner_id)
        raise


def _create(door: Door, request: BundleRequest) -> Result:
    try:
        return {"BundleTask": _shown(door.tasks.create(request))}
    except BundlingInProgress as error:  # another call was quicker since we looked
        raise EC2Error("BundlingInProgress", bundle_id=error.bundle_id) from None
    except PrefixInUse as error:
        raise EC2Error("InvalidParameterValue", str(error)) from None
    except TooManyBundleTasks as error:
        raise EC2Error("ResourceLimitExceeded", limit=error.limit) from None


def _shown(task: BundleTask) -> Result:
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
