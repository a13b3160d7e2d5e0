"""The table of the actions, EC2's and STS's, with the function of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from thrave.ec2.backend import Caller, Ec2Backend
from thrave.ec2.bundle_actions import bundle_instance, cancel_bundle_task, check_bundle_instance, describe_bundle_tasks
from thrave.ec2.instance_actions import (
    describe_instances,
    reboot_instances,
    start_instances,
    stop_instances,
    terminate_instances,
)
from thrave.ec2.protocol import Parameters, Result
from thrave.ec2.region_actions import (
    describe_account_attributes,
    describe_availability_zones,
    describe_regions,
    get_caller_identity,
)
from thrave.ec2.service_models import EC2, STS, Service


@dataclass(frozen=True)
class Action:
    """An action of the API.

    Attributes:
        function: Does the action; input and output are those of the model. Raises EC2Error.
        also_required: Names in the form of parameters that the action needs although the model does not require them.
        service: The service of the action. Names of actions are unique in all services.
        no_permission_needed: Whether every authenticated caller may do it, whatever the policies say.
        reads_database_only: Whether it only reads the database, and so is fast.
        check: Makes the checks of the action for DryRun, and changes nothing. Raises EC2Error.
    """

    function: Callable[[Ec2Backend, Caller, Parameters], Result]
    also_required: tuple[str, ...] = ()
    service: Service = EC2
    no_permission_needed: bool = False
    reads_database_only: bool = False
    check: Callable[[Ec2Backend, Caller, Parameters], object] | None = None


# "Required: Yes" in AWS's EC2 API Reference from 2009-04-04 to 2013-02-01; the model of 2016 no longer says it.
_S3_STORAGE = tuple(
    f"Storage.S3.{name}" for name in ("AWSAccessKeyId", "Bucket", "Prefix", "UploadPolicy", "UploadPolicySignature")
)

ACTIONS: Mapping[str, Action] = {
    "BundleInstance": Action(bundle_instance, also_required=_S3_STORAGE, check=check_bundle_instance),
    "CancelBundleTask": Action(cancel_bundle_task),
    "DescribeAccountAttributes": Action(describe_account_attributes),
    "DescribeAvailabilityZones": Action(describe_availability_zones),
    "DescribeBundleTasks": Action(describe_bundle_tasks, reads_database_only=True),
    "DescribeInstances": Action(describe_instances),
    "DescribeRegions": Action(describe_regions),
    # "No permissions are required to perform this operation": AWS STS API Reference.
    "GetCallerIdentity": Action(get_caller_identity, service=STS, no_permission_needed=True),
    "RebootInstances": Action(reboot_instances),
    "StartInstances": Action(start_instances),
    "StopInstances": Action(stop_instances),
    "TerminateInstances": Action(terminate_instances),
}
