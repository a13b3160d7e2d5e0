"""Public API for tests of other projects: a real Thrave service on a free port of 127.0.0.1.

`__all__` lists the public names; everything else in this package may change.

    with ThraveService.running(tmp_path) as service:
        account = service.new_account("alice")
        ec2 = account.client("ec2")                     # boto3's, unmodified
        instance = account.instance()
        ec2.bundle_instance(InstanceId=instance.instance_id, Storage=account.storage("bucket", "prefix"))
        account.client("s3").list_objects_v2(Bucket="bucket")

With pytest, the fixtures `thrave_service`, `thrave_ec2` and so on do this. The service is not a mock: `ThraveServer` is
the `thrave serve` command in a process of its own, and `ThraveService` is the same service with a store in memory,
faults and a clock that a test controls.
"""

from thrave.testing.account import ServiceAccount, ServiceClock
from thrave.testing.server import (
    REGION,
    ComponentMissingError,
    ServerError,
    ThraveServer,
    import_boto3,
    upload_policy,
)
from thrave.testing.service import ThraveService

__all__ = [
    "REGION",
    "ComponentMissingError",
    "ServerError",
    "ServiceAccount",
    "ServiceClock",
    "ThraveServer",
    "ThraveService",
    "import_boto3",
    "upload_policy",
]
