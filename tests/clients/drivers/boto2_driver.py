"""boto 2, which signs the upload policy itself, driven as `clients/driving.py` says."""

import base64
import json
import os
import sys
import time
from urllib.parse import urlsplit

import boto
from boto.ec2.connection import EC2Connection
from boto.exception import EC2ResponseError
from boto.regioninfo import RegionInfo


def connect(endpoint):
    host, port = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    region = RegionInfo(name=os.environ["AWS_DEFAULT_REGION"], endpoint=host)
    return EC2Connection(region=region, port=port, is_secure=False)


def bundle(ec2, instance, bucket, prefix, policy, signature, **options):
    return shown(ec2.bundle_instance(instance, bucket, prefix, base64.b64encode(policy.encode()).decode(), **options))


def dry_run(ec2, *arguments):
    return bundle(ec2, *arguments, dry_run=True)


def describe(ec2, prefix):
    return {"tasks": [shown(task) for task in ec2.get_all_bundle_tasks(filters={"s3-prefix": prefix})]}


def wait(ec2, bundle_id):
    while True:
        (task,) = ec2.get_all_bundle_tasks([bundle_id])
        if task.state in {"complete", "failed"}:
            return shown(task)
        time.sleep(0.1)


def cancel(ec2, bundle_id):
    return shown(ec2.cancel_bundle_task(bundle_id))


def version(ec2):
    return {"version": boto.__version__}


def shown(task):
    return {"id": task.id, "state": task.state}


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
except EC2ResponseError as error:
    answer = {"error": error.error_code}
json.dump(answer, sys.stdout)
