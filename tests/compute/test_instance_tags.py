"""EC2's limits of tags, and tags in instance files and fleet reports."""

import json

import pytest

from thrave.compute import description_files
from thrave.compute.errors import InvalidDescriptionError
from thrave.compute.instance import MAX_KEY, MAX_TAGS, MAX_VALUE, validate_tags

AT_THE_LIMIT = {"k" * MAX_KEY: "v" * MAX_VALUE, **{f"key {number}": "" for number in range(MAX_TAGS - 1)}}


@pytest.mark.parametrize("tags", [{}, {"Name": "web"}, {"aws": "x"}, {"日本 key ": "é €"}, AT_THE_LIMIT])
def test_validate_tags_accepts_what_ec2_allows(tags):
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
def test_validate_tags_names_reason(tags, message):
    with pytest.raises(ValueError, match=message):
        validate_tags(tags)


@pytest.mark.parametrize(("tags", "message"), REFUSED[:-1])  # JSON has no way to write the last one
def test_file_with_invalid_tags_is_refused(described, tags, message):
    written = description_files.format_description(described())
    changed = json.dumps({**json.loads(written), "tags": tags}).encode()
    with pytest.raises(InvalidDescriptionError, match=message):
        description_files.parse_description(json.loads(written)["instanceId"], changed, "the file")


def test_documents_keep_spelling_of_tag_keys(described):
    tags = {"snake_case": "1", "camelCase": "2", "Title Case": "3", "team:cost-center": "4"}
    described = described(tags=tags)
    assert description_files.to_document(described)["tags"] == tags
    assert description_files.from_document(description_files.to_document(described)).tags == tags
    assert (
        description_files.parse_description(
            described.instance_id, description_files.format_description(described), "the file"
        ).tags
        == tags
    )
