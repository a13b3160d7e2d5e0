"""Bundle tasks and instance-store images for moto, the in-memory AWS.

    import thrave.moto

    thrave.moto.install()                # once, before the first use of moto's EC2

    @mock_aws
    def test_bundling():
        ec2 = boto3.client("ec2")
        run = ec2.run_instances(ImageId=thrave.moto.WINDOWS_IMAGE_ID, MinCount=1, MaxCount=1)
        ec2.bundle_instance(InstanceId=run["Instances"][0]["InstanceId"], Storage=...)

Requests are checked by the same code as in the service. The bundles in moto's S3 are real: `thrave open` opens them.
`install` replaces the entry of EC2 in moto's table of URLs; it changes no class and no function of moto.
"""

try:
    import moto  # noqa: F401 (a clear message if it is missing)
except ImportError as error:
    raise ImportError("moto is not installed: pip install 'thrave[moto]'") from error

from thrave.moto.bundle_tasks import STATE_MODEL
from thrave.moto.images import WINDOWS_IMAGE_ID
from thrave.moto.installation import install, root_disk, service_certificate, service_key

__all__ = ["STATE_MODEL", "WINDOWS_IMAGE_ID", "install", "root_disk", "service_certificate", "service_key"]
