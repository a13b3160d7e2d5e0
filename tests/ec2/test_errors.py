"""The table of EC2 errors: complete, without unused rows, and safe to fill in."""

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
def test_every_error_that_is_raised_is_in_the_table_and_fills_in_its_message(code, has_message, fields):
    wanted = {name for _, name, _, _ in string.Formatter().parse(ERRORS[code].message) if name}
    assert has_message or None in fields or fields == wanted


def test_every_row_of_the_table_is_raised_somewhere():
    of_protocol = {error.code for error in protocol_errors.ProtocolError.__subclasses__()}
    assert {param.values[0] for param in raised()} | of_protocol == set(ERRORS)


@pytest.mark.parametrize("code", ERRORS)
def test_every_row_says_when_it_is_answered_and_where_that_is_known_from(code):
    kind = ERRORS[code]
    assert 400 <= kind.status <= 599
    assert kind.cause.endswith(".")
    assert kind.source


def test_only_what_nobody_foresaw_haste_and_a_store_that_fails_are_answered_with_a_status_that_clients_retry():
    retried = {code for code, kind in ERRORS.items() if kind.status >= 500}
    assert retried == {"InternalError", "RequestLimitExceeded", "Unavailable"}


def test_a_value_of_the_callers_cannot_reach_into_the_template():
    error = EC2Error("InvalidAction", action="{0.__class__} {action}")
    assert error.message == "The action {0.__class__} {action} is not valid for this web service."
