"""What a test double of EC2 must do to count as one for bundle tasks and instance-store images: one table of probes.

A probe looks at the effects of calls: objects in the bucket, the power of the instance, what is refused. The form of a
response alone proves nothing: an empty body has it, too.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from support.conformance.doubles import Double
from support.eventually import eventually
from thrave.bundle import DirectoryParts, Sealer, open_bundle, read_manifest, write_manifest
from thrave.identity.certificates import load_private_key, new_private_key, self_signed
from thrave.moto.disks import GeneratedDisk

BUCKET = "my-bundles"
STATES = ("pending", "waiting-for-shutdown", "bundling", "storing", "complete")
ENDED = ("complete", "failed")
_TITLE = re.compile(r"<title>(.*?)</title>|$")


class NotConformant(Exception):
    """The double does something else; the message says what."""


class Outcome(NamedTuple):
    """The result of a probe."""

    is_ok: bool
    detail: str
    """What the double does instead; empty if it conforms."""


class Probe(NamedTuple):
    """A row of the table."""

    area: str
    title: str
    run: Callable[[Double], None]


def run_probe(probe: Probe, double: Double) -> Outcome:
    """Run a probe."""
    try:
        probe.run(double)
    except NotConformant as error:
        return Outcome(is_ok=False, detail=str(error))
    except ClientError as error:
        operation, found = error.operation_name, error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return Outcome(is_ok=False, detail=f"{operation}: {found.get('Code') or f'status {status}'}")
    except ResponseParserError as error:
        return Outcome(is_ok=False, detail=f"the response is not XML: {_TITLE.search(str(error))[1]}")
    return Outcome(is_ok=True, detail="")


# Helpers


def require(condition: object, otherwise: str) -> None:
    """Raise NotConformant unless the condition holds."""
    if not condition:
        raise NotConformant(otherwise)


@contextmanager
def refused(*codes: str):
    """Require that the call in the block is refused with one of these codes."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        require(code in codes, f"{error.operation_name}: {code}")
    else:
        raise NotConformant("the request is accepted")


def start(double: Double, instance_id: str | None = None, **changes: Any) -> tuple[str, str, str]:
    """Start a bundle task; return its id, the instance and the prefix."""
    instance_id, prefix = instance_id or double.new_instance(), double.new_prefix()
    storage = double.storage(BUCKET, prefix)
    storage["S3"].update(changes)
    response = double.client("ec2").bundle_instance(InstanceId=instance_id, Storage=storage)
    require("BundleTask" in response, "BundleInstance: the response has no task")
    return response["BundleTask"]["BundleId"], instance_id, prefix


def describe(double: Double, bundle_id: str) -> dict[str, Any]:
    """Return a task."""
    tasks = double.client("ec2").describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"]
    require(len(tasks) == 1, f"DescribeBundleTasks: {len(tasks)} tasks")
    return tasks[0]


def await_end(double: Double, bundle_id: str) -> dict[str, Any]:
    """Wait until a task has ended; return it."""
    return eventually(lambda: describe(double, bundle_id), "the task ends", until=lambda task: task["State"] in ENDED)


def keys(double: Double, prefix: str) -> list[str]:
    """Return the objects of a bundle; none if there is no bucket."""
    try:
        found = double.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}.")
    except ClientError as error:
        require(error.response["Error"]["Code"] == "NoSuchBucket", str(error))
        return []
    return [entry["Key"] for entry in found.get("Contents", [])]


def power(double: Double, instance_id: str) -> str:
    """Return the state of an instance."""
    found = double.client("ec2").describe_instances(InstanceIds=[instance_id])
    return str(found["Reservations"][0]["Instances"][0]["State"]["Name"])


def complete_bundle(double: Double) -> tuple[str, str]:
    """Make a bundle; return the instance and the prefix."""
    bundle_id, instance_id, prefix = start(double)
    task = await_end(double, bundle_id)
    require(task["State"] == "complete", f"the task fails: {task.get('BundleTaskError', {}).get('Code')}")
    return instance_id, prefix


def bundle_for_image(double: Double) -> str:
    """Make a bundle, or store one that was made elsewhere if the double cannot make one; return its prefix."""
    try:
        return complete_bundle(double)[1]
    except (ClientError, ResponseParserError):
        s3, prefix = double.client("s3"), double.new_prefix()
        identity = self_signed("probe", key := new_private_key())
        sealer = Sealer(GeneratedDisk(prefix), prefix)
        objects = {part.filename: bytes(part.data) for part in sealer.parts()}
        objects[f"{prefix}.manifest.xml"] = write_manifest(
            sealer.sealed, account_id="123456789012", architecture="x86_64", user_certificate=None,
            service_certificate=identity, signing_key=key,
        )  # fmt: skip
        s3.create_bucket(Bucket=BUCKET)
        for name, content in objects.items():
            s3.put_object(Bucket=BUCKET, Key=name, Body=content)
        return prefix


def fetch(double: Double, prefix: str, folder: Path) -> bytes:
    """Download a bundle; return its manifest."""
    for key in keys(double, prefix):
        double.client("s3").download_file(BUCKET, key, str(folder / key))
    manifest = folder / f"{prefix}.manifest.xml"
    require(manifest.exists(), "the task is complete without a manifest in the bucket")
    return manifest.read_bytes()


def register(double: Double, prefix: str, name: str) -> str:
    """Register a bundle as an image."""
    location = f"{BUCKET}/{prefix}.manifest.xml"
    return str(double.client("ec2").register_image(Name=name, ImageLocation=location)["ImageId"])


# Probes


def probe_objects(double: Double) -> None:
    _, prefix = complete_bundle(double)
    with tempfile.TemporaryDirectory() as folder:
        manifest = read_manifest(fetch(double, prefix, Path(folder)))
        missing = [part.filename for part in manifest.parts if not (Path(folder) / part.filename).exists()]
        require(manifest.parts and not missing, f"missing parts: {', '.join(missing)}")


def probe_opens(double: Double) -> None:
    instance_id, prefix = complete_bundle(double)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = fetch(double, prefix, folder)
        require(double.private_key is not None, "no certificate can be set")
        open_bundle(manifest, DirectoryParts(folder), load_private_key(double.private_key or ""), folder / "opened")
        require((folder / "opened").read_bytes() == double.root_volume(instance_id), "other bytes")


def probe_states(double: Double) -> None:
    with double.step_by_step():
        bundle_id, _, _ = start(double)
        seen = ["pending"]
        for _ in STATES:
            double.advance(bundle_id)
            seen.append(describe(double, bundle_id)["State"])
            if seen[-1] in ENDED:
                break
        require(tuple(dict.fromkeys(seen)) == STATES, f"states: {', '.join(dict.fromkeys(seen))}")


def probe_progress(double: Double) -> None:
    with double.step_by_step():
        bundle_id, _, _ = start(double)
        found: dict[str, Any] = {}
        for _ in STATES:
            double.advance(bundle_id)
            task = describe(double, bundle_id)
            found[task["State"]] = task.get("Progress")
            if task["State"] in ENDED:
                break
        for state in ("bundling", "storing"):
            value = str(found.get(state) or "")
            require(value.endswith("%") and 0 <= int(value[:-1]) <= 100, f"progress in {state}: {value or 'none'}")
        require(found.get("complete") == "100%", f"progress in complete: {found.get('complete')}")


def probe_power(double: Double) -> None:
    with double.step_by_step():
        bundle_id, instance_id, _ = start(double)
        found: dict[str, str] = {}
        for _ in STATES:
            double.advance(bundle_id)
            state = describe(double, bundle_id)["State"]
            found[state] = power(double, instance_id)
            if state in ENDED:
                break
    require(found.get("bundling") == "stopped", f"while bundling: {found.get('bundling', 'state not seen')}")
    require(found.get("complete") == "running", f"after the task: {found.get('complete', 'state not seen')}")


def probe_cancel(double: Double) -> None:
    with double.step_by_step():
        bundle_id, instance_id, prefix = start(double)
        while describe(double, bundle_id)["State"] not in ("bundling", *ENDED):
            double.advance(bundle_id)
        response = double.client("ec2").cancel_bundle_task(BundleId=bundle_id)
        state = response.get("BundleTask", {}).get("State")
        require(state in ("cancelling", "failed"), f"state after the call: {state}")
        task = await_end(double, bundle_id)
    code = task.get("BundleTaskError", {}).get("Code")
    require(task["State"] == "failed" and code == "Client.Cancelled", f"the task ends as {task['State']}, {code}")
    require(keys(double, prefix) == [], "objects remain in the bucket")
    require(power(double, instance_id) == "running", f"the instance is {power(double, instance_id)}")


def probe_cancel_ended(double: Double) -> None:
    bundle_id, _, _ = start(double)
    await_end(double, bundle_id)
    with refused("IncorrectState"):
        double.client("ec2").cancel_bundle_task(BundleId=bundle_id)


def probe_filters(double: Double) -> None:
    bundle_id, instance_id, prefix = start(double)
    await_end(double, bundle_id)
    other, _, _ = start(double)
    await_end(double, other)
    ec2 = double.client("ec2")
    matching = {"bundle-id": bundle_id, "instance-id": instance_id, "s3-prefix": prefix}
    for name, value in matching.items():
        tasks = ec2.describe_bundle_tasks(Filters=[{"Name": name, "Values": [value]}])["BundleTasks"]
        require([task["BundleId"] for task in tasks] == [bundle_id], f"filter {name}: {len(tasks)} tasks")
    for name, value in {"state": "bundling", "s3-bucket": "another", "error-code": "Client.*"}.items():
        filters = [{"Name": name, "Values": [value]}, {"Name": "bundle-id", "Values": [bundle_id]}]
        require(ec2.describe_bundle_tasks(Filters=filters)["BundleTasks"] == [], f"filter {name} is ignored")


def probe_unknown_task(double: Double) -> None:
    with refused("InvalidBundleID.NotFound"):
        double.client("ec2").describe_bundle_tasks(BundleIds=["bun-0123456789abcdef0"])


def probe_unknown_instance(double: Double) -> None:
    with refused("InvalidInstanceID.NotFound"):
        start(double, "i-0123456789abcdef0")


def probe_linux(double: Double) -> None:
    instance_id = double.new_instance(platform=None)
    with refused("InvalidParameterValue", "UnsupportedOperation", "InvalidInstanceType"):
        start(double, instance_id)


def probe_second_task(double: Double) -> None:
    with double.step_by_step():
        bundle_id, instance_id, _ = start(double)
        with refused("BundlingInProgress"):
            start(double, instance_id)
        double.client("ec2").cancel_bundle_task(BundleId=bundle_id)
        await_end(double, bundle_id)


def probe_wrong_signature(double: Double) -> None:
    instance_id = double.new_instance()
    with refused("InvalidParameterValue", "SignatureDoesNotMatch", "AuthFailure", "AccessDenied"):
        start(double, instance_id, UploadPolicySignature="AAAAAAAAAAAAAAAAAAAAAAAAAAA=")
    require(power(double, instance_id) == "running", "the instance was stopped")


def probe_expired_policy(double: Double) -> None:
    expired = double.storage(BUCKET, "image", hours=-1)["S3"]
    changes = {name: expired[name] for name in ("UploadPolicy", "UploadPolicySignature")}
    with refused("InvalidParameterValue", "AccessDenied", "AuthFailure"):
        start(double, **changes)


def probe_dry_run(double: Double) -> None:
    ec2, instance_id = double.client("ec2"), double.new_instance()
    before = len(ec2.describe_bundle_tasks()["BundleTasks"])
    with refused("DryRunOperation"):
        ec2.bundle_instance(InstanceId=instance_id, Storage=double.storage(BUCKET, double.new_prefix()), DryRun=True)
    require(len(ec2.describe_bundle_tasks()["BundleTasks"]) == before, "a task was created")


def probe_register(double: Double) -> None:
    prefix = bundle_for_image(double)
    image_id = register(double, prefix, f"registered-{prefix}")
    (image,) = double.client("ec2").describe_images(ImageIds=[image_id])["Images"]
    kind, location = image.get("RootDeviceType"), image.get("ImageLocation") or ""
    require(kind == "instance-store", f"DescribeImages: the root device type is {kind}")
    is_manifest = location.endswith(f"{BUCKET}/{prefix}.manifest.xml")
    require(is_manifest, "DescribeImages: the location is not that of the manifest")
    require(not image.get("BlockDeviceMappings"), "the image has EBS volumes")


def probe_register_nothing(double: Double) -> None:
    with refused("InvalidManifest", "InvalidAMIManifest", "InvalidParameterValue"):
        register(double, "no-such-bundle", "nothing")


def probe_register_damaged(double: Double) -> None:
    prefix = bundle_for_image(double)
    s3, key = double.client("s3"), f"{prefix}.manifest.xml"
    content = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=key, Body=content.replace(b"<architecture>", b"<architecture> "))
    with refused("InvalidManifest", "InvalidAMIManifest", "InvalidParameterValue"):
        register(double, prefix, f"damaged-{prefix}")


def probe_launch(double: Double) -> None:
    prefix = bundle_for_image(double)
    image_id = register(double, prefix, f"launched-{prefix}")
    (instance,) = double.client("ec2").run_instances(ImageId=image_id, MinCount=1, MaxCount=1)["Instances"]
    found = double.client("ec2").describe_instances(InstanceIds=[instance["InstanceId"]])
    (instance,) = found["Reservations"][0]["Instances"]
    require(
        instance["RootDeviceType"] == "instance-store",
        f"DescribeInstances: the root device type is {instance['RootDeviceType']}",
    )
    require(instance["State"]["Name"] in ("pending", "running"), f"state: {instance['State']['Name']}")
    require(instance.get("Platform") == "windows", f"platform: {instance.get('Platform')}")


_TASK, _REFUSED, _IMAGE = "bundle task", "refused requests", "instance-store image"

PROBES: Mapping[str, Probe] = {
    "objects": Probe(
        _TASK, "a complete bundle is in the bucket: the manifest, and each part that it names", probe_objects
    ),
    "opens": Probe(_TASK, "the bundle opens with the account's key to the bytes of the root volume", probe_opens),
    "states": Probe(_TASK, "the task has the states of EC2 in their order", probe_states),
    "progress": Probe(_TASK, "the progress is a percentage", probe_progress),
    "power": Probe(_TASK, "the instance is stopped while it is bundled, and runs afterwards", probe_power),
    "cancel": Probe(
        _TASK, "a cancelled task fails with `Client.Cancelled`, leaves no object, and the instance runs", probe_cancel
    ),
    "filters": Probe(_TASK, "DescribeBundleTasks applies filters", probe_filters),
    "dry-run": Probe(_TASK, "DryRun makes the checks and creates no task", probe_dry_run),
    "cancel-ended": Probe(_REFUSED, "cancel a task that has ended", probe_cancel_ended),
    "unknown-task": Probe(_REFUSED, "describe a task that does not exist", probe_unknown_task),
    "unknown-instance": Probe(_REFUSED, "bundle an instance that does not exist", probe_unknown_instance),
    "linux": Probe(_REFUSED, "bundle an instance that does not run Windows", probe_linux),
    "second-task": Probe(_REFUSED, "bundle an instance that is being bundled", probe_second_task),
    "wrong-signature": Probe(_REFUSED, "an upload policy with a wrong signature", probe_wrong_signature),
    "expired-policy": Probe(_REFUSED, "an upload policy that has expired", probe_expired_policy),
    "register": Probe(_IMAGE, "RegisterImage makes an instance-store image of a bundle's manifest", probe_register),
    "register-nothing": Probe(_IMAGE, "RegisterImage refuses a manifest that does not exist", probe_register_nothing),
    "register-damaged": Probe(_IMAGE, "RegisterImage refuses a manifest that was changed", probe_register_damaged),
    "launch": Probe(
        _IMAGE, "RunInstances launches the image as a Windows instance on the instance store", probe_launch
    ),
}
