"""The contract in `thrave.buckets.base`, on every driver."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.buckets.bucket_drivers import ALICE, BOB
from support.buckets.upload_policies import (
    FAR,
    bundle_document,
    document,
    verified,
)
from thrave.buckets.errors import (
    AccessDenied,
    BucketAlreadyExists,
    EntityTooLarge,
    EntityTooSmall,
    InvalidBucketName,
    NoSuchBucket,
    NoSuchKey,
)
from thrave.buckets.retrying_store import RetryingStore


@pytest.fixture
def name(store):
    """The name of a bucket that does not exist."""
    return store.name


@pytest.fixture
def buckets(store):
    """The store on behalf of Alice."""
    return store.of(ALICE)


@pytest.fixture
def bucket(buckets, name):
    buckets.create(name, ALICE)
    return name


def md5(data):
    return hashlib.md5(data).hexdigest()


def listed(buckets, bucket, prefix):
    return sorted(buckets.list(bucket, prefix), key=str.encode)


def test_owner_is_the_creator(buckets, name):
    assert buckets.owner(name) is None
    buckets.create(name, ALICE)
    assert buckets.owner(name) == ALICE


def test_create_own_bucket_again_changes_nothing(buckets, bucket):
    buckets.put(bucket, "key", b"data")
    buckets.create(bucket, ALICE)
    assert buckets.get(bucket, "key") == b"data"


def test_create_returns_whether_it_created_the_bucket(buckets, name):
    assert buckets.create(name, ALICE) is True
    assert buckets.create(name, ALICE) is False


def test_remove_removes_an_empty_bucket_and_its_owner(store, buckets, bucket):
    assert buckets.remove(bucket, ALICE) is True
    assert buckets.owner(bucket) is None
    assert buckets.remove(bucket, ALICE) is True
    assert buckets.create(bucket, ALICE) is True


def test_remove_keeps_bucket_with_objects_and_its_owner(buckets, bucket):
    buckets.put(bucket, "folder/key", b"data")
    assert buckets.remove(bucket, ALICE) is False
    assert (buckets.owner(bucket), buckets.get(bucket, "folder/key")) == (ALICE, b"data")


def test_remove_keeps_bucket_of_another_account(store, buckets, bucket):
    try:
        removed = store.of(BOB).remove(bucket, BOB)
    except AccessDenied:
        removed = False
    assert (removed, buckets.owner(bucket)) == (False, ALICE)


def test_create_rejects_bucket_of_another_account(store, buckets, bucket):
    with pytest.raises(BucketAlreadyExists):
        store.of(BOB).create(bucket, BOB)
    assert buckets.owner(bucket) == ALICE
    assert store.of(BOB).owner(bucket) not in (BOB, None)


def test_create_in_parallel_has_one_owner(store, name):
    def create(account):
        try:
            RetryingStore(store.of(account), 20).create(name, account)  # parallel creation can be a transient error
        except BucketAlreadyExists:
            return None
        return account

    with ThreadPoolExecutor(8) as pool:
        created = {account for account in pool.map(create, [ALICE, BOB] * 4) if account}
    assert len(created) == 1
    assert created == {account for account in (ALICE, BOB) if store.of(account).owner(name) == account}


@pytest.mark.parametrize("name", ["", "..", "../etc", "a/b", ".owners", "UPPER", "ab", "a" * 64])
def test_invalid_bucket_name_has_no_owner_and_is_rejected(buckets, name):
    assert buckets.owner(name) is None
    with pytest.raises(InvalidBucketName):
        buckets.create(name, ALICE)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4096], ids=["empty", "one byte", "1 MiB"])
def test_get_and_head_return_what_was_put(buckets, bucket, data):
    etag = buckets.put(bucket, "win1.part.0", data)
    assert buckets.get(bucket, "win1.part.0") == data
    head = buckets.head(bucket, "win1.part.0")
    assert head.etag == etag
    assert (head.size, head.etag or md5(data)) == (len(data), md5(data))


@pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 4), (3, 5), (8, 5), (10, 1), (50, 5), (0, 1 << 20)])
def test_get_range_ends_with_the_object(buckets, bucket, start, length):
    buckets.put(bucket, "key", b"0123456789")
    assert buckets.get_range(bucket, "key", start, length) == b"0123456789"[start : start + length]


def test_put_accepts_memoryview(buckets, bucket):
    buckets.put(bucket, "key", memoryview(b"0123456789")[2:5])
    assert buckets.get(bucket, "key") == b"234"


def test_put_replaces_object(buckets, bucket):
    buckets.put(bucket, "key", b"a longer first")
    buckets.put(bucket, "key", b"second")
    assert buckets.get(bucket, "key") == b"second"
    assert listed(buckets, bucket, "") == ["key"]


def test_get_never_returns_a_part_of_an_object(buckets, bucket):
    contents = [bytes([n]) * 200_000 for n in range(4)]
    buckets.put(bucket, "key", contents[0])
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(lambda: [buckets.put(bucket, "key", content) for content in contents * 5])
        while not writing.done():
            assert buckets.get(bucket, "key") in contents
        writing.result()


def test_put_and_delete_in_parallel_in_one_folder_succeed(buckets, bucket):
    def put_and_delete(name):
        for _ in range(30):
            buckets.put(bucket, f"folder/below/{name}", b"data")
            buckets.delete(bucket, [f"folder/below/{name}"])

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(put_and_delete, "abcd")]
    assert listed(buckets, bucket, "") == []


KEYS = ["backups/win1.part.0", "win1.manifest.xml", "win1.part.0", "ä.part.0", "with space", "a+b=c&d"]


@pytest.mark.parametrize("key", KEYS)
def test_keys_with_slashes_and_other_characters_are_unchanged(buckets, bucket, key):
    buckets.put(bucket, key, b"data")
    assert buckets.get(bucket, key) == b"data"
    assert listed(buckets, bucket, "") == [key]


def test_list_returns_keys_with_prefix(buckets, bucket):
    keys = ["a-b", "a.b", "a/b", "a/c/d", "a0", "ab", "b", "ä", "￿", "\U0001f33e"]
    for key in reversed(keys):
        buckets.put(bucket, key, b"")
    assert listed(buckets, bucket, "") == sorted(keys, key=str.encode)
    assert listed(buckets, bucket, "a/") == ["a/b", "a/c/d"]
    assert listed(buckets, bucket, "a/c") == ["a/c/d"]
    assert listed(buckets, bucket, "a") == ["a-b", "a.b", "a/b", "a/c/d", "a0", "ab"]
    assert listed(buckets, bucket, "none") == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sets(st.text("ab-0", min_size=1, max_size=3).map("/".join), max_size=8))
def test_list_is_sorted(buckets, bucket, keys):
    held = {key for key in keys if not any(other.startswith(key + "/") for other in keys)}
    for key in held:
        buckets.put(bucket, key, b"")
    assert listed(buckets, bucket, "") == sorted(held)
    for prefix in {key[:2] for key in keys}:
        assert listed(buckets, bucket, prefix) == sorted(key for key in held if key.startswith(prefix))
    buckets.delete(bucket, held)
    assert listed(buckets, bucket, "") == []


def test_delete_removes_exactly_the_named_keys(buckets, bucket):
    keys = ["win1.part.0", "win1.part.1", "win1.part.10", "win10.part.0", "backups/win1.part.0"]
    for key in keys:
        buckets.put(bucket, key, b"data")
    buckets.delete(bucket, ["win1.part.1", "backups/win1.part.0", "never.was", "never/was"])
    assert listed(buckets, bucket, "") == ["win1.part.0", "win1.part.10", "win10.part.0"]
    buckets.delete(bucket, iter(["win1.part.1"]))
    assert buckets.owner(bucket) == ALICE


def test_name_of_a_folder_is_not_a_key(buckets, bucket):
    buckets.put(bucket, "backups/win1", b"data")
    assert buckets.head(bucket, "backups") is None
    buckets.delete(bucket, ["backups"])
    assert buckets.get(bucket, "backups/win1") == b"data"


def test_missing_bucket_or_key_raises_error(buckets, bucket, name):
    assert buckets.head(bucket, "none") is None
    assert buckets.head(f"{name}-none", "none") is None
    with pytest.raises(NoSuchKey):
        buckets.get(bucket, "none")
    buckets.delete(f"{name}-none", ["key"])
    with pytest.raises(NoSuchKey):
        buckets.get_range(bucket, "none", 0, 1)
    for call in (
        lambda: buckets.get(f"{name}-none", "key"),
        lambda: [*buckets.list(f"{name}-none", "")],
    ):
        with pytest.raises(NoSuchBucket):
            call()
    assert buckets.owner(f"{name}-none") is None


def test_put_into_missing_bucket_raises_error(store, buckets, name):
    if store.creates_buckets:
        pytest.skip("SeaweedFS makes the bucket, if its user may make one")
    with pytest.raises(NoSuchBucket):
        buckets.put(name, "key", b"data")


def test_put_under_policy_is_stored(store, buckets, bucket):
    policy = verified(bundle_document(bucket, "win1", acl=store.acl))
    for key in ("win1.part.0", "win1.manifest.xml", "win1.manifest.json"):
        buckets.put(bucket, key, b"data", policy=policy)
    assert listed(buckets, bucket, "") == ["win1.manifest.json", "win1.manifest.xml", "win1.part.0"]


EXPIRED = "2020-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("conditions", "expiration", "error"),
    [
        (["NAME", ["starts-with", "$key", "other"]], FAR, AccessDenied),
        ([{"bucket": "other-bucket"}, ["starts-with", "$key", "win1"]], FAR, AccessDenied),
        (["NAME", ["starts-with", "$key", "win1"]], EXPIRED, AccessDenied),
        (["NAME"], FAR, AccessDenied),
        (["NAME", ["starts-with", "$key", "win1"], ["content-length-range", 0, 3]], FAR, EntityTooLarge),
        (["NAME", ["starts-with", "$key", "win1"], ["content-length-range", 6, 9]], FAR, EntityTooSmall),
    ],
    ids=["key", "bucket", "expired", "key not named", "too long", "too short"],
)
def test_put_that_policy_forbids_is_not_stored(buckets, bucket, conditions, expiration, error):
    named = [{"bucket": bucket} if condition == "NAME" else condition for condition in conditions]
    buckets.put(bucket, "win1.part.0", b"before")
    with pytest.raises(error):
        buckets.put(bucket, "win1.part.0", b"after", policy=verified(document(*named, expiration=expiration)))
    assert buckets.get(bucket, "win1.part.0") == b"before"
