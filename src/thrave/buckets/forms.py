"""An HTML-form upload (S3's POST): the caller's own policy and signature, and no key of the service's.

The form carries only the fields that the policy names (`UploadPolicy.form_fields`), then the file, as
multipart/form-data (RFC 7578). The parts around the content are small; the content itself is sent from where it lies.
Source: AWS S3 documentation, "POST Object" and "HTML form fields".
"""

import secrets
from collections.abc import Mapping, Sequence

from thrave.buckets.transport import Buffer


def multipart(fields: Mapping[str, str], content: Buffer) -> tuple[str, Sequence[Buffer]]:
    """A form with a file, as its Content-Type and the pieces of its body.

    Args:
        fields: In their order; the names are the store's, the values whatever the policy says.
        content: The file's.
    """
    boundary = secrets.token_hex(16)  # cannot stand in any value, nor by chance in the content
    head = "".join(_field(boundary, name, value) for name, value in fields.items())
    opening = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n\r\n'
    closing = f"\r\n--{boundary}--\r\n"
    return f"multipart/form-data; boundary={boundary}", ((head + opening).encode(), content, closing.encode())


def _field(boundary: str, name: str, value: str) -> str:
    quoted = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")  # as browsers do
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{quoted}"\r\n\r\n{value}\r\n'
