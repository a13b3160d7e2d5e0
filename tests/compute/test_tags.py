"""Tags of instances: EC2's limits hold wherever they come from, and a fleet's report keeps them as they are."""

import json

import pytest

from thrave.compute import description_files
from thrave.compute.errors import InvalidDescriptionError
from thrave.compute.instance import MAX_KEY, MAX_TAGS, MAX_VALUE, validate_tags

AT_THE_LIMIT = {"k" * MAX_KEY: "v" * MAX_VALUE, **{f"key {number}": "" for number in range(MAX_TAGS - 1)}}


@pytest.mark.parametrize("tags", [{}, {"Name": "web"}, {"aws": "x"}, {"日本 key ": "é €"}, AT_THE_LIMIT])
def test_what_ec2_allows_is_taken_as_it_is(tags):
    assert validate_tags(tags) is tags


REFUSED = [
    ({**AT_THE_LIMIT, "one": "more"}, "51 tags: an instance may have at most 50"),
    ({"": "x"}, "the tag '' has no key"),
    ({"k" * (MAX_KEY + 1): "x"}, "has a key of more than 128 characters"),
    ({"long": "v" * (MAX_VALUE + 1)}, "the tag 'long' has a value of more than 256 characters"),
    ({"aws:mine": "x"}, "the tag 'aws:mine' begins with aws:, which AWS reserves"),
    ({"AWS:mine": "x"}, "begins with aws:"),
    ({"bell": "\a"}, "the tag 'bell' contains a control character"),
    ({"new\nline": ""}, "contains a control character"),
    ({"no UTF-8": "\udcff"}, "contains a control character"),
]


@pytest.mark.parametrize(("tags", "message"), REFUSED)
def test_what_ec2_does_not_allow_is_named(tags, message):
    with pytest.raises(ValueError, match=message):
        validate_tags(tags)


@pytest.mark.parametrize(("tags", "message"), REFUSED[:-1])  # JSON has no way to write the last one
def test_an_instances_file_with_such_tags_is_refused(described, tags, message):
    written = description_files.write(described())
    changed = json.dumps({**json.loads(written), "tags": tags}).encode()
    with pytest.raises(InvalidDescriptionError, match=message):
        description_files.read(json.loads(written)["instanceId"], changed, "the file")


def test_keys_stay_as_they_were_written(described):
    tags = {"snake_case": "1", "camelCase": "2", "Title Case": "3", "team:cost-center": "4"}
    described = described(tags=tags)
    assert description_files.document(described)["tags"] == tags
    assert description_files.from_document(description_files.document(described)).tags == tags
    assert description_files.read(described.instance_id, description_files.write(described), "the file").tags == tags
