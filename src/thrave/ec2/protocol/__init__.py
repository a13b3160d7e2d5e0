"""EC2's Query protocol, driven by botocore's models of the services: forms in, XML out.

A request is an HTML form (`Filter.1.Value.2=x`); `read_form` and `parse` turn it into the operation's input, with every
name, type and required member checked against the model. An answer is XML; `serialize` and `error_document` write it.

These modules know nothing of HTTP, signatures, accounts or bundling, import nothing else of ours, and never guess:
what the model does not describe is an error of the caller's.

Source of the rules: the `ec2` protocol as botocore's `EC2Serializer` and `EC2QueryParser` implement it, and for answers
also the `query` protocol (`QueryParser`); for what real clients send beyond it, the client is named beside the rule.
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
