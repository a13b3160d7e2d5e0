"""Valid names of buckets and prefixes of bundles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrave.buckets.base import check_bucket_name, split_prefix
from thrave.buckets.errors import InvalidArgument, InvalidBucketName

GOOD_BUCKETS = ["abc", "my-bucket", "my.bucket.2026", "0123", "a" * 63, "a-.b", "1.2.3", "xn-a"]
BAD_BUCKETS = [
    "", "ab", "a" * 64, "My-Bucket", "my_bucket", "-abc", "abc-", ".abc", "abc.", "a..b", "192.168.5.4", "xn--abc",
    "sthree-abc", "sthree-configurator", "amzn-s3-demo-abc", "abc-s3alias", "abc--ol-s3", "abc.mrap", "abc--x-s3",
    "abc--table-s3", "a/b", "a b", "abc\n", "äbc", "a\0c", "\N{ARABIC-INDIC DIGIT ONE}bc", "../abc",
]  # fmt: skip


@pytest.mark.parametrize("bucket", GOOD_BUCKETS)
def test_bucket_name_that_s3_accepts_is_accepted(bucket):
    check_bucket_name(bucket)


@pytest.mark.parametrize("bucket", BAD_BUCKETS)
def test_bucket_name_that_s3_rejects_is_rejected(bucket):
    with pytest.raises(InvalidBucketName):
        check_bucket_name(bucket)


@pytest.mark.parametrize(
    ("prefix", "folder", "name"),
    [
        ("win1", "", "win1"),
        ("backups/win1", "backups/", "win1"),
        ("a/b/c", "a/b/", "c"),
        ("_win-1.2", "", "_win-1.2"),
        ("x" * 100, "", "x" * 100),
    ],
)
def test_prefix_is_split_into_folder_and_name(prefix, folder, name):
    assert split_prefix(prefix) == (folder, name)


BAD_PREFIXES = [
    "", "/", "/win1", "win1/", "a//b", ".hidden", "a/.hidden", "..", "../win1", "a/../b", "-rf", "a/-rf", "win 1",
    "wiñ", "日本", 'a"b', "a'b", "; touch x ;", "$(touch x)", "a\nb", "win1\n", "a\0b", "a\\b", "${filename}", "a&b",
    "<a>", "x" * 101, "y/" * 510 + "x", "\N{ARABIC-INDIC DIGIT ONE}",
]  # fmt: skip


@pytest.mark.parametrize("prefix", BAD_PREFIXES)
def test_prefix_that_is_unsafe_for_readers_is_rejected(prefix):
    with pytest.raises(InvalidArgument):
        split_prefix(prefix)


@given(st.text())
def test_accepted_prefix_is_plain_and_joins_to_itself(prefix):
    try:
        folder, name = split_prefix(prefix)
    except InvalidArgument:
        return
    assert folder + name == prefix
    assert prefix.isascii()
    assert not set(prefix) & set("\\ '\"$;&|<>*?\n\0")
