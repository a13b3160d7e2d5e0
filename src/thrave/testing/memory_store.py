"""moto's S3 as the object store of a service in the same process, with faults."""

import logging
from typing import Any

from moto.core.utils import utcnow
from moto.iam.models import AccessKey as MotoAccessKey
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

from thrave.buckets.errors import AccessDenied, TransientError
from thrave.buckets.upload_policy import UploadPolicy
from thrave.concurrency import new_event, start_thread
from thrave.identity.accounts import AccessKey
from thrave.moto.adapters import MotoBuckets
from thrave.testing.faults import Fault, FaultList

_PARTITION = "aws"


class MemoryStore(MotoBuckets):
    """Buckets in memory, which S3 clients use over HTTP, too. An `ObjectStore`.

    Args:
        region: Region of new buckets.
        faults: The faults of the service.
    """

    def __init__(self, region: str, faults: FaultList) -> None:
        super().__init__(region, _PARTITION)
        self._faults = faults
        self._released = new_event()

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, policy: UploadPolicy | None = None) -> str | None:
        """See ObjectStore."""
        fault = self._faults.take_for_object(_kind(key))
        if fault is not None and fault.name == "store-loses":
            if policy is not None:
                super().put(bucket, key, data, policy=policy)
            self.delete(bucket, [key])
            return None
        if fault is not None:
            self._fail(fault)
        return super().put(bucket, key, data, policy=policy)

    def _fail(self, fault: Fault) -> None:
        """Raise the error of a fault; wait for the end of the test before."""
        if fault.name == "store-refuses":
            raise AccessDenied("Access Denied")
        if fault.name == "store-waits":
            self._released.wait()
        raise TransientError("SlowDown", 503, "Please reduce your request rate.")

    def release(self) -> None:
        """End the uploads that wait. They fail."""
        released, self._released = self._released, new_event()
        released.set()

    def add_key(self, key: AccessKey) -> None:
        """Have moto count requests with a key as requests of the key's account."""
        moto_key = MotoAccessKey(None, "AKIA", key.account_id)
        moto_key.access_key_id, moto_key.secret_access_key = key.access_key_id, key.secret_access_key
        moto_key.create_date = utcnow()
        iam_backends[key.account_id][_PARTITION].access_keys[key.access_key_id] = moto_key

    def remove_all(self, account_id: str) -> None:
        """Remove all buckets of an account, with their objects."""
        buckets = s3_backends[account_id][_PARTITION].buckets
        for bucket in list(buckets):
            del buckets[bucket]
            s3_backends.bucket_accounts.pop(bucket, None)

    def serve(self) -> str:
        """Serve the buckets on a free port of 127.0.0.1 in a thread; return the URL."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request otherwise
        application: Any = create_backend_app("s3")
        server = make_server("127.0.0.1", 0, application, threaded=True)
        start_thread(
            "s3", server.serve_forever, on_failure=lambda error: logging.getLogger(__name__).error("%s", error)
        )
        return f"http://127.0.0.1:{server.server_port}"


def _kind(key: str) -> str:
    """Return the kind of an object of a bundle."""
    if key.endswith(".manifest.xml"):
        return "manifest"
    return "side-file" if key.endswith(".manifest.json") else "part"
