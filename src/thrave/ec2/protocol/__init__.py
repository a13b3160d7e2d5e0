"""EC2's Query protocol, by botocore's models of the services: form to input, output to XML.

A request is an HTML form (`Filter.1.Value.2=x`). `read_form` and `parse` check every name, type and required member
against the model; what the model does not describe is an error. A response is XML (`serialize`, `error_document`).
These modules know no HTTP, signatures, accounts or bundling, and import nothing else of Thrave.

Sources: the `ec2` protocol as botocore's `EC2Serializer` and `EC2QueryParser` implement it, and for responses also the
`query` protocol (`QueryParser`). Where real clients send something else, a comment names the client.
"""

from thrave.ec2.protocol.parser import Blob, Parameters, ProtocolError, Result, join_forms, parse, read_form
from thrave.ec2.protocol.serializer import error_document, format_timestamp, serialize

__all__ = [
    "Blob",
    "Parameters",
    "ProtocolError",
    "Result",
    "error_document",
    "format_timestamp",
    "join_forms",
    "parse",
    "read_form",
    "serialize",
]
