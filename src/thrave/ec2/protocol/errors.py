"""What the protocol refuses. Each error carries EC2's own code and a message for the caller.

    ProtocolError
    ├── MalformedQueryStringError   not UTF-8 once percent-decoded
    ├── TooManyParametersError      more than any call needs
    ├── InvalidQueryParameterError  the same parameter twice, or one name as a value and as a structure
    ├── InvalidCharacterError       a character that no XML answer could carry
    ├── UnknownParameterError       a name that the operation does not have
    ├── MissingParameterError       a required member is absent
    └── InvalidValueError           not of the member's type

Source of the codes: "Error codes for the Amazon EC2 API" (AWS).
"""

from typing import ClassVar


class ProtocolError(Exception):
    """A request that the protocol or the model refuses; its text is for the caller."""

    code: ClassVar[str]


class MalformedQueryStringError(ProtocolError):
    """The form is not percent-encoded UTF-8."""

    code = "MalformedQueryString"


class TooManyParametersError(ProtocolError):
    """The form has more parameters than any call needs."""

    code = "RequestEntityTooLarge"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request has more than {limit} parameters.")


class InvalidQueryParameterError(ProtocolError):
    """A parameter is given twice, or contradicts another."""

    code = "InvalidQueryParameter"


class InvalidCharacterError(ProtocolError):
    """A name or value holds a character that XML 1.0 cannot carry, such as NUL."""

    code = "InvalidCharacter"


class UnknownParameterError(ProtocolError):
    """The operation has no such parameter."""

    code = "UnknownParameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"The parameter {name} is not recognized")


class MissingParameterError(ProtocolError):
    """A parameter that is required is absent."""

    code = "MissingParameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"The request must contain the parameter {name}")


class InvalidValueError(ProtocolError):
    """A value is not of the type that the model gives its parameter."""

    code = "InvalidParameterValue"

    def __init__(self, name: str, value: str, wanted: str) -> None:
        super().__init__(f"Value ({value}) for parameter {name} is invalid. It must be {wanted}.")
