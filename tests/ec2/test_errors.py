"""The table of EC2 errors: complete, without unused rows, and safe with any value."""

import ast
import string
from pathlib import Path

import pytest

import thrave.ec2
from thrave.ec2.errors import ERRORS, EC2Error
from thrave.ec2.protocol import parser as protocol_errors

SOURCES = sorted(Path(thrave.ec2.__file__).parent.rglob("*.py"))


def raised():
    """Every `EC2Error("Code", …)` in the source: file and line, code, whether it brings its message, its fields."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "EC2Error":
                code, *message = node.args
                if isinstance(code, ast.Constant):
                    fields = {keyword.arg for keyword in node.keywords}
                    yield pytest.param(code.value, bool(message), fields, id=f"{path.name}:{node.lineno}")


@pytest.mark.parametrize(("code", "has_message", "fields"), [*raised()])
def test_errors_table_has_every_raised_error_and_its_fields(code, has_message, fields):
    wanted = {name for _, name, _, _ in string.Formatter().parse(ERRORS[code].message) if name}
    assert has_message or None in fields or fields == wanted


def test_errors_table_has_no_unused_rows():
    of_protocol = {error.code for error in protocol_errors.ProtocolError.__subclasses__()}
    assert {param.values[0] for param in raised()} | of_protocol == set(ERRORS)


@pytest.mark.parametrize("code", ERRORS)
def test_errors_table_rows_have_cause_and_source(code):
    kind = ERRORS[code]
    assert 400 <= kind.status <= 599
    assert kind.cause.endswith(".")
    assert kind.source


def test_errors_with_a_retried_status_are_transient_or_unexpected():
    retried = {code for code, kind in ERRORS.items() if kind.status >= 500}
    assert retried == {"InternalError", "RequestLimitExceeded", "Unavailable"}


def test_error_message_does_not_format_values_of_the_caller():
    error = EC2Error("InvalidAction", action="{0.__class__} {action}")
    assert error.message == "The action {0.__class__} {action} is not valid for this web service."
