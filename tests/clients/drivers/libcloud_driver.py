"""libcloud, which has no method for bundling but signs and sends any action, driven as `clients/driving.py` says."""

import base64
import json
import os
import sys
import time
from urllib.parse import urlsplit

import libcloud
from libcloud.compute.drivers.ec2 import EC2NodeDriver


def connect(endpoint):
    host, port = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    return EC2NodeDriver(key, secret, region=os.environ["AWS_DEFAULT_REGION"], host=host, port=port, secure=False)


def call(ec2, action, **parameters):
    """The answer's tasks."""
    document = ec2.connection.request(ec2.path, params={"Action": action, **parameters}).object
    namespace = document.tag.partition("}")[0] + "}"
    tasks = [element for element in document.iter() if element.find(f"{namespace}bundleId") is not None]
    return [
        {"id": task.findtext(f"{namespace}bundleId"), "state": task.findtext(f"{namespace}state")} for task in tasks
    ]


def bundle(ec2, instance, bucket, prefix, policy, signature, **options):
    s3 = {
        "Storage.S3.AWSAccessKeyId": os.environ["AWS_ACCESS_KEY_ID"],
        "Storage.S3.Bucket": bucket,
        "Storage.S3.Prefix": prefix,
        "Storage.S3.UploadPolicy": base64.b64encode(policy.encode()).decode(),
        "Storage.S3.UploadPolicySignature": signature,
    }
    return call(ec2, "BundleInstance", InstanceId=instance, **s3, **options)[0]


def dry_run(ec2, *arguments):
    return bundle(ec2, *arguments, DryRun="true")


def describe(ec2, prefix):
    return {"tasks": call(ec2, "DescribeBundleTasks", **{"Filter.1.Name": "s3-prefix", "Filter.1.Value.1": prefix})}


def wait(ec2, bundle_id):
    while True:
        (task,) = call(ec2, "DescribeBundleTasks", **{"BundleId.1": bundle_id})
        if task["state"] in {"complete", "failed"}:
            return task
        time.sleep(0.1)


def cancel(ec2, bundle_id):
    return call(ec2, "CancelBundleTask", BundleId=bundle_id)[0]


def version(ec2):
    return {"version": libcloud.__version__}


ACTIONS = {
    "bundle": bundle,
    "dry-run": dry_run,
    "describe": describe,
    "wait": wait,
    "cancel": cancel,
    "version": version,
}

action, endpoint, *rest = sys.argv[1:]
try:
    answer = ACTIONS[action](connect(endpoint), *rest)
except Exception as error:  # libcloud raises plain exceptions, which begin with the code
    code, colon, _ = str(error).partition(": ")
    if not colon:
        raise
    answer = {"error": code}
json.dump(answer, sys.stdout)
