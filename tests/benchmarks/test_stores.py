"""The benchmark of stores with a small disk: ETags of the discarding store, memory and connections."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET
from thrave.buckets.s3_client import Credentials, StoreConfig
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.upload_policy import UploadPolicy
from thrave.testing import upload_policy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TESTS = Path(__file__).parents[1]


@pytest.fixture
def stores(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stores

    return stores


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 << 20])
def test_discarding_store_responds_with_the_etag_of_the_object(stores, size):
    content = os.urandom(size)
    digest = hashlib.md5(content).hexdigest()
    document, signature = upload_policy(SECRET, "my-bucket", "win")
    policy = UploadPolicy.parse_trusted(base64.b64encode(document).decode(), signature, ACCESS_KEY_ID)
    with stores.discarding() as url:
        key = Credentials(access_key_id=ACCESS_KEY_ID, secret_access_key=SECRET)
        objects = S3ObjectClient(StoreConfig(endpoint=url, credentials=key))
        assert objects.put("my-bucket", "win.put", content) == digest
        assert objects.put("my-bucket", "win.post", content, policy=policy) == digest
        assert [objects.head("my-bucket", name).size for name in ("win.put", "win.post")] == [size, size]
        assert objects.head("my-bucket", "win.other") is None


def test_stores_benchmark_samples_memory_and_connections(tmp_path):
    kept = tmp_path / "stores.json"
    run = [sys.executable, BENCHMARKS / "stores.py", "--gib", "0.15", "--mib", "0", "--json", kept]
    told = subprocess.run(run, check=True, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True)
    endurance = json.loads(kept.read_text())["endurance"]
    assert "into a store that discards" in told.stdout
    assert endurance["parts"] == 16
    assert 0 < endurance["peak_connections"] <= 5
    assert endurance["peak_rss"] < 400 << 20
