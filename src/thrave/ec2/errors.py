"""Every error of the EC2 API: one table, from which `docs/reference/ec2-errors.md` is generated.

`to_ec2_error` converts errors of instances, disk images, object stores and the database. Their own messages may name
files of the host, so they are logged and not returned to callers.
"""

# Codes and meanings are those of AWS's "Error codes for the Amazon EC2 API". Where AWS's message or status for a case
# is not known, `source` says whose choice it is. AWS answers most client errors with 400; other statuses were observed.
# SDKs retry 500 and 503 and no other status, so no error with these two may be used once work has begun.

from collections.abc import Mapping
from typing import NamedTuple

from thrave.buckets.errors import BucketError, Kind
from thrave.compute.errors import (
    HypervisorError,
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceError,
    InstanceLocked,
    InstanceNotFound,
    InvalidDescriptionError,
)
from thrave.database import is_unavailable
from thrave.volumes.errors import VolumeError

AWS = "AWS, Error codes for the Amazon EC2 API"
OBSERVED = "observed from AWS in public issue threads"
EUCALYPTUS = "Eucalyptus 4.4, VmControl.bundleInstance"
OURS = "ours: AWS's response is not known"


class ErrorDefinition(NamedTuple):
    """A row of the table.

    Attributes:
        status: HTTP status of the response.
        message: Message for the caller; a template with the fields of `EC2Error`.
        cause: When the error is returned.
        source: Where code and message come from.
    """

    status: int
    message: str
    cause: str
    source: str


ERRORS: dict[str, ErrorDefinition] = {
    # Authentication and permissions
    "AuthFailure": ErrorDefinition(
        401,
        "AWS was not able to validate the provided access credentials",
        "The key is unknown or inactive, or the signature, its scope's date or the body's digest does not match.",
        OBSERVED,
    ),
    "InvalidClientTokenId": ErrorDefinition(
        403,
        "The security token included in the request is invalid.",
        "STS (GetCallerIdentity) returns this code where EC2 returns AuthFailure.",
        OBSERVED,
    ),
    "IncompleteSignature": ErrorDefinition(
        400,
        "{reason}",
        "The signature does not have the form of its version, or does not cover a required part of the request.",
        AWS,
    ),
    "RequestExpired": ErrorDefinition(
        400,
        "Request has expired.",
        "The request's time differs from the service's by more than 15 minutes, or a presigned URL has expired.",
        OBSERVED,
    ),
    "UnauthorizedOperation": ErrorDefinition(
        403, "You are not authorized to perform this operation.", "No policy allows the caller this action.", AWS
    ),
    "DryRunOperation": ErrorDefinition(
        412,
        "Request would have succeeded, but DryRun flag is set.",
        "DryRun=true, and the request passes the checks. BundleInstance makes all checks that change nothing.",
        OBSERVED,
    ),
    # The request
    "InvalidAction": ErrorDefinition(
        400, "The action {action} is not valid for this web service.", "The service does not have this action.", AWS
    ),
    "NoSuchVersion": ErrorDefinition(
        400,
        "The requested API version ({version}) does not exist. Use one from {oldest} to {newest}.",
        "The Version is not one of EC2's API versions.",
        AWS,
    ),
    "UnsupportedProtocol": ErrorDefinition(
        400,
        "SOAP is not supported. Send a form (application/x-www-form-urlencoded) or a query string.",
        "The body's content type is not that of a form.",
        AWS,
    ),
    "RequestEntityTooLarge": ErrorDefinition(
        413,
        "The request is larger than {limit} bytes.",
        "The body or the query string is too long, or there are too many parameters.",
        OURS,
    ),
    "InvalidRequest": ErrorDefinition(
        400, "The request cannot be read.", "Unexpected error while reading the request; the log has the details.", OURS
    ),
    "InvalidPath": ErrorDefinition(
        404,
        "There is no EC2 API at the path {path}. Use {url} as the endpoint.",
        "The path is not `/`, `/services/compute`, `/services/Eucalyptus` or `/services/Cloud`.",
        OURS,
    ),
    "MethodNotAllowed": ErrorDefinition(
        405,
        "The method {method} is not allowed. Use GET or POST at {url}.",
        "The method is not GET or POST. HEAD is not allowed either: its response would have no body with the result.",
        OURS,
    ),
    "MalformedQueryString": ErrorDefinition(400, "{reason}", "The form is not percent-encoded UTF-8.", AWS),
    "InvalidQueryParameter": ErrorDefinition(
        400, "{reason}", "A parameter occurs twice, or both as a value and as a structure.", AWS
    ),
    "InvalidCharacter": ErrorDefinition(400, "{reason}", "A value has a character that XML does not allow.", AWS),
    "UnknownParameter": ErrorDefinition(
        400, "The parameter {name} is not recognized", "The action has no such parameter.", AWS
    ),
    "MissingParameter": ErrorDefinition(
        400,
        "The request must contain the parameter {name}",
        "A required parameter is missing, or all credentials are.",
        OBSERVED,
    ),
    "InvalidParameterValue": ErrorDefinition(
        400,
        "Value ({value}) for parameter {name} is invalid.",
        "A value does not have its parameter's type, or breaks a rule; the message says which.",
        EUCALYPTUS,
    ),
    "InvalidParameterCombination": ErrorDefinition(
        400,
        "The parameter {one} cannot be used with the parameter {other}",
        "DescribeInstances with ids and MaxResults.",
        AWS,
    ),
    "InvalidPaginationToken": ErrorDefinition(
        400, "The specified pagination token is not valid.", "The NextToken is not from this service.", AWS
    ),
    "FilterLimitExceeded": ErrorDefinition(
        400,
        "The maximum number of filter values specified on a single call is {limit}.",
        "The request has more filter values than allowed.",
        AWS,
    ),
    # Instances
    "InvalidInstanceID.Malformed": ErrorDefinition(
        400,
        'Invalid id: "{instance_id}" (expecting "i-...")',
        "The id does not have the form i-xxxxxxxx or i-xxxxxxxxxxxxxxxxx.",
        AWS,
    ),
    "InvalidInstanceID.NotFound": ErrorDefinition(
        400,
        "The instance ID '{instance_id}' does not exist",
        "There is no such instance, or it belongs to another account.",
        AWS,
    ),
    "InvalidInstanceType": ErrorDefinition(
        400,
        "The instance type is not supported for this request. You can only bundle instance store-backed Windows"
        " instances.",
        "BundleInstance of an instance that is not Windows, or whose root device is an EBS volume.",
        AWS,
    ),
    "IncorrectInstanceState": ErrorDefinition(
        400,
        "The instance '{instance_id}' is not in a state from which it can be {change}: {reason}.",
        "The instance's state does not allow the action, a bundle task uses the instance, its description is invalid,"
        " or its root volume cannot be read; the message says which.",
        f"{AWS}; the message is ours",
    ),
    "OperationNotPermitted": ErrorDefinition(
        400,
        "{reason}",
        "The instance cannot be stopped: its description has a stateCommand and no stopCommand.",
        f"{AWS}; the choice of code is ours",
    ),
    "UnsupportedOperation": ErrorDefinition(
        400, "{operation} is not supported.", "StopInstances with Hibernate=true.", AWS
    ),
    # Bundle tasks
    "BundlingInProgress": ErrorDefinition(
        400,
        "Instance is already being bundled: {bundle_id}",
        "The instance has a bundle task that is not finished. A repeated BundleInstance returns this error.",
        f"{AWS}; the message is Eucalyptus's",
    ),
    "InvalidBundleID.NotFound": ErrorDefinition(
        400,
        "The bundle task ID '{bundle_id}' does not exist",
        "There is no such bundle task, it is no longer listed, or it belongs to another account.",
        f"{AWS}; the message is ours",
    ),
    "IncorrectState": ErrorDefinition(
        400,
        "The bundle task '{bundle_id}' cannot be cancelled: it is {state}.",
        "CancelBundleTask of a task that is complete, failed or being cancelled.",
        f"{AWS}; the choice of code is ours",
    ),
    "InaccessibleStorageLocation": ErrorDefinition(
        400,
        "The bucket '{bucket}' belongs to another account than the access key '{access_key_id}'.",
        "The bucket of BundleInstance does not belong to the account of AWSAccessKeyId.",
        f"{AWS}; the choice of code is ours",
    ),
    "ResourceLimitExceeded": ErrorDefinition(
        400,
        "You have exceeded an Amazon EC2 resource limit. You may have {limit} bundle tasks in progress.",
        "The account already has as many unfinished bundle tasks as `max_tasks_per_account` allows.",
        f"{AWS}; the choice of code is ours",
    ),
    # The service
    "RequestLimitExceeded": ErrorDefinition(
        503,
        "Request limit exceeded.",
        "The account sends more requests than `max_requests_per_second` and `max_request_burst` allow. SDKs retry.",
        AWS,
    ),
    "Unavailable": ErrorDefinition(
        503,
        "The service cannot reach what it needs: {reason}",
        "The hypervisor or the database does not answer, or a command of the instance fails. For BundleInstance also:"
        " the store fails, or is known to fail. SDKs retry.",
        f"{AWS}; the choice of code is ours",
    ),
    "InternalError": ErrorDefinition(
        500,
        "An internal error has occurred. Retry your request; if the problem persists, report it with the request ID.",
        "Unexpected error; the service's log has the details under the request ID.",
        AWS,
    ),
}  # fmt: skip


class EC2Error(Exception):
    """An error response: a row of `ERRORS` with its message filled in.

    Attributes:
        code: EC2's code.
        message: Message for the caller, without secrets.
        status: HTTP status.
    """

    def __init__(self, code: str, message: str | None = None, /, **fields: object) -> None:
        """Create an error.

        Args:
            code: A key of `ERRORS`.
            message: Replaces the message of the table.
            fields: Fields of the table's message.
        """
        definition = ERRORS[code]
        self.code = code
        self.status = definition.status
        self.message = definition.message.format(**fields) if message is None else message
        super().__init__(f"{code}: {self.message}")


# Errors of an instance or its disk image: code, and reason for the caller. The first class in the error's method
# resolution order decides, so every subclass has a row.
_INSTANCE_ERRORS: Mapping[type[Exception], tuple[str, str]] = {
    InstanceNotFound: ("InvalidInstanceID.NotFound", ""),
    InstanceLocked: ("IncorrectInstanceState", "its volume is being read or it is being started; try again later"),
    IncorrectInstanceState: ("IncorrectInstanceState", "its state does not allow it"),
    InvalidDescriptionError: (
        "IncorrectInstanceState",
        "its description is not valid. The log of the service has the reason",
    ),
    InstanceCommandFailed: (
        "Unavailable",
        "a command of the instance {instance_id} fails. The log of the service has the reason",
    ),
    HypervisorError: ("Unavailable", "the hypervisor does not answer, or refuses"),
    InstanceError: ("IncorrectInstanceState", "the hypervisor refuses the call. The log of the service has the reason"),
    VolumeError: ("IncorrectInstanceState", "its volume cannot be read. The operator can run `thrave doctor`"),
}


def to_ec2_error(error: Exception) -> EC2Error | None:
    """Return the EC2 error for an error of another package; None for an unexpected error.

    The message has no text of the error, which may name files of the host.
    """
    if is_unavailable(error):
        return EC2Error("Unavailable", reason="the database does not answer")
    if isinstance(error, BucketError):
        if error.kind is Kind.TRANSIENT:
            return EC2Error("Unavailable", reason=f"the store answers {error.code}")
        return EC2Error("InvalidParameterValue", f"The store refuses the request: {error.code}.")
    row = next((_INSTANCE_ERRORS[base] for base in type(error).__mro__ if base in _INSTANCE_ERRORS), None)
    if row is None:
        return None
    code, reason = row
    instance_id = getattr(error, "instance_id", "")
    reason = reason.format(instance_id=instance_id)
    # Each code uses some of these fields.
    return EC2Error(code, instance_id=instance_id, change="used", reason=reason)
