"""boto3, of any version, driven as `clients/driving.py` says."""

import json
import os
import sys

import boto3
from botocore.exceptions import ClientError


def bundle(ec2, instance, bucket, prefix, policy, signature, **options):
    s3 = {
        "AWSAccessKeyId": os.environ["AWS_ACCESS_KEY_ID"],
        "Bucket": bucket,
        "Prefix": prefix,
        "UploadPolicy": policy.encode(),
        "UploadPolicySignature": signature,
    }
    return shown(ec2.bundle_instance(InstanceId=instance, Storage={"S3": s3}, **options)["BundleTask"])


def dry_run(ec2, *arguments):
    return bundle(ec2, *arguments, DryRun=True)


def describe(ec2, prefix):
    tasks = ec2.describe_bundle_tasks(Filters=[{"Name": "s3-prefix", "Values": [prefix]}])["BundleTasks"]
    return {"tasks": [shown(task) for task in tasks]}


def wait(ec2, bundle_id):
    config = {"Delay": 1, "MaxAttempts": 60}
    ec2.get_waiter("bundle_task_complete").wait(BundleIds=[bundle_id], WaiterConfig=config)
    return shown(ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"][0])


def cancel(ec2, bundle_id):
    return shown(ec2.cancel_bundle_task(BundleId=bundle_id)["BundleTask"])


def version(ec2):
    return {"version": boto3.__version__}


def shown(task):
    return {"id": task["BundleId"], "state": task["State"]}


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
    answer = ACTIONS[action](boto3.client("ec2", endpoint_url=endpoint), *rest)
except ClientError as error:
    answer = {"error": error.response["Error"]["Code"]}
json.dump(answer, sys.stdout)
