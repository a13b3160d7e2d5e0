"""Metadata that an operator writes are parsed, or refused with the name of the fault."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.libvirt.domain_xml import WINDOWS, xml
from thrave.compute.errors import InvalidDomainError
from thrave.compute.libvirt.domain_metadata import (
    InstanceMetadata,
    OverlayMetadata,
    check_metadata,
    format_metadata,
    parse_metadata,
)
from thrave.compute.libvirt.domain_xml import read_definition

NOW = datetime(2026, 11, 23, 10, tzinfo=UTC)
OURS = '<t:instance xmlns:t="https://thrave.dev/xmlns/instance/1" {attributes}>{children}</t:instance>'


def record(attributes='account="123456789012"', children=""):
    return parse_metadata(read_definition(xml(metadata=OURS.format(attributes=attributes, children=children))).metadata)


def test_parse_metadata_reads_element_of_operator():
    assert parse_metadata(read_definition(xml(metadata=WINDOWS)).metadata) is None
    said = record(
        'account="123456789012" platform="windows" rootDevice="vdb" rootDeviceType="ebs" secretFile="/s" '
        'launchTime="2026-11-23T11:00:00+01:00" terminated="true"',
        '<t:tag key="Name">web</t:tag><t:tag key="empty"/><!-- a comment -->'
        '<t:frozen path="/vm/c" format="raw" overlay="/vm/o" paused="true"/>',
    )
    assert said == InstanceMetadata(
        account_id="123456789012",
        platform="windows",
        root_device="vdb",
        root_device_type="ebs",
        secret_file=Path("/s"),
        tags={"Name": "web", "empty": ""},
        launch_time=NOW,
        terminated=True,
        frozen=OverlayMetadata(path=Path("/vm/c"), format="raw", overlay=Path("/vm/o"), paused=True),
    )


FAULTS = {
    "": "account: is missing",
    'account="alice"': "account: 'alice' is not 12 digits",
    'account="123456789012" platfrom="windows"': "platfrom: is none of account, launchTime, platform,",
    'account="123456789012" platform="dos"': "platform: 'dos' is none of windows, linux",
    'account="123456789012" rootDeviceType="floppy"': "rootDeviceType: 'floppy' is none of instance-store, ebs",
    'account="123456789012" secretFile="secret"': "secretFile: must be an absolute path",
    'account="123456789012" launchTime="today"': "launchTime: 'today' is not a time",
    'account="123456789012" launchTime="2026-11-23T10:00:00"': "has no time zone",
    'account="123456789012" terminated="maybe"': "terminated: 'maybe' is none of true, false",
}
CHILD_FAULTS = {
    "<t:tags/>": "tags: is neither tag nor frozen",
    "<t:tag>web</t:tag>": "key: is missing",
    '<t:tag key="a"/><t:tag key="a"/>': "tag: two tags with the key 'a'",
    '<t:tag key="aws:x">1</t:tag>': "which AWS reserves",
    "".join(f'<t:tag key="{number}"/>' for number in range(51)): "51 tags: an instance may have at most 50",
    '<t:frozen path="/vm/c" format="raw"/>': "overlay: is missing",
    '<t:frozen path="c" format="raw" overlay="/o"/>': "path: must be an absolute path",
    '<t:frozen path="/vm/c" overlay="/o"/>': "format: is missing",
    '<t:frozen path="/vm/c" format="raw" overlay="/o" base="/b"/>': "base: is none of",
}


@pytest.mark.parametrize("attributes", FAULTS)
def test_parse_metadata_names_faulty_attribute(attributes):
    with pytest.raises(InvalidDomainError, match=re.escape(FAULTS[attributes])):
        record(attributes)


@pytest.mark.parametrize("children", CHILD_FAULTS)
def test_parse_metadata_names_faulty_child(children):
    with pytest.raises(InvalidDomainError, match=re.escape(CHILD_FAULTS[children])):
        record(children=children)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\ufffe\uffff"), max_size=20)
PATHS = TEXT.filter(lambda text: "/" not in text).map(lambda text: Path("/", text))


@given(
    tags=st.dictionaries(TEXT.filter(lambda key: key and not key.lower().startswith("aws:")), TEXT, max_size=4),
    secret_file=st.none() | PATHS,
    terminated=st.booleans(),
    overlay=st.none() | PATHS,
)
def test_parse_metadata_returns_formatted_metadata(tags, secret_file, terminated, overlay):
    frozen = overlay and OverlayMetadata(path=Path("/c"), format="raw", overlay=overlay, secret_file=secret_file)
    written = InstanceMetadata(
        account_id="123456789012",
        tags=tags,
        secret_file=secret_file,
        terminated=terminated,
        frozen=frozen,
        launch_time=NOW,
    )
    check_metadata(written)
    definition = read_definition(xml(metadata=format_metadata(written, prefix="thrave:")))
    assert parse_metadata(definition.metadata) == written


@pytest.mark.parametrize(
    "said",
    [
        InstanceMetadata(account_id="alice"),
        InstanceMetadata(account_id="123456789012", tags={"a": "\0"}),
        InstanceMetadata(account_id=""),
    ],
)
def test_check_metadata_refuses_what_xml_cannot_keep(said):
    with pytest.raises(InvalidDomainError):
        check_metadata(said)
