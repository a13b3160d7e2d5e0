"""Every error that the API answers with: one table, from which the documentation's page of errors is made.

`ec2_error_of` is the one place where errors of instances, disk images, object stores and the database become errors of
EC2's. Their own text may name files of the host, so no caller is shown it; the log has it.

Codes and meanings are those of AWS's "Error codes for the Amazon EC2 API"; where AWS's own words or status for a case
are not known, the row's source says whose choice it is. Statuses: AWS answers most client errors with 400, and those
few differently that were observed so. SDKs retry 500 and 503 and nothing else, so no row with such a status may be
used once work has begun.
"""

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
OURS = "ours: AWS's answer is not known"


class ErrorKind(NamedTuple):
    """A row of the table.

    Attributes:
        status: Of the HTTP answer.
        message: For the caller; a template over the fields that `EC2Error` is given.
        cause: When it is answered.
        source: Where code and words come from.
    """

    status: int
    message: str
    cause: str
    source: str


ERRORS: dict[str, ErrorKind] = {
    # Who is calling
    "AuthFailure": ErrorKind(
        401,
        "AWS was not able to validate the provided access credentials",
        "The key is unknown or inactive, or the signature, its scope's date or the body's digest does not match.",
        OBSERVED,
    ),
    "InvalidClientTokenId": ErrorKind(
        403,
        "The security token included in the request is invalid.",
        "What is AuthFailure to a caller of EC2, to a caller of STS (GetCallerIdentity).",
        OBSERVED,
    ),
    "IncompleteSignature": ErrorKind(
        400,
        "{reason}",
        "The signature is not of the form that its version has, or does not cover what it must.",
        AWS,
    ),
    "RequestExpired": ErrorKind(
        400,
        "Request has expired.",
        "The request's time is more than 15 minutes from ours, or a presigned URL's life is over.",
        OBSERVED,
    ),
    "UnauthorizedOperation": ErrorKind(
        403, "You are not authorized to perform this operation.", "No policy allows the caller this action.", AWS
    ),
    "DryRunOperation": ErrorKind(
        412,
        "Request would have succeeded, but DryRun flag is set.",
        "DryRun=true, and the request passes the checks; BundleInstance makes all of them that change nothing.",
        OBSERVED,
    ),
    # What is being asked
    "InvalidAction": ErrorKind(
        400, "The action {action} is not valid for this web service.", "An Action that is not answered here.", AWS
    ),
    "NoSuchVersion": ErrorKind(
        400,
        "The requested API version ({version}) does not exist. Use one from {oldest} to {newest}.",
        "A Version that is not one of EC2's API versions.",
        AWS,
    ),
    "UnsupportedProtocol": ErrorKind(
        400,
        "SOAP is not supported. Send a form (application/x-www-form-urlencoded) or a query string.",
        "A body of another content type than a form's.",
        AWS,
    ),
    "RequestEntityTooLarge": ErrorKind(
        413,
        "The request is larger than {limit} bytes.",
        "The body or the query string is too long, or there are too many parameters.",
        OURS,
    ),
    "InvalidRequest": ErrorKind(
        400, "The request cannot be read.", "Reading the request failed in a way that was not foreseen.", OURS
    ),
    "InvalidPath": ErrorKind(
        404,
        "There is no EC2 API at the path {path}. Use {url} as the endpoint.",
        "A path other than `/`, `/services/compute`, `/services/Eucalyptus` and `/services/Cloud`.",
        OURS,
    ),
    "MethodNotAllowed": ErrorKind(
        405,
        "The method {method} is not allowed. Use GET or POST at {url}.",
        "A method other than GET and POST. HEAD is none of them, since it would hide what an action has answered.",
        OURS,
    ),
    "MalformedQueryString": ErrorKind(400, "{reason}", "The form is not percent-encoded UTF-8.", AWS),
    "InvalidQueryParameter": ErrorKind(
        400, "{reason}", "A parameter is given twice, or both as a value and as a structure.", AWS
    ),
    "InvalidCharacter": ErrorKind(400, "{reason}", "A value holds a character that XML does not allow.", AWS),
    "UnknownParameter": ErrorKind(
        400, "The parameter {name} is not recognized", "The action has no such parameter.", AWS
    ),
    "MissingParameter": ErrorKind(
        400,
        "The request must contain the parameter {name}",
        "A required parameter, or every credential, is absent.",
        OBSERVED,
    ),
    "InvalidParameterValue": ErrorKind(
        400,
        "Value ({value}) for parameter {name} is invalid.",
        "A value is not of its parameter's type, or breaks a rule; the message says which.",
        EUCALYPTUS,
    ),
    "InvalidParameterCombination": ErrorKind(
        400,
        "The parameter {one} cannot be used with the parameter {other}",
        "DescribeInstances with ids and MaxResults.",
        AWS,
    ),
    "InvalidPaginationToken": ErrorKind(
        400, "The specified pagination token is not valid.", "A NextToken that no answer of ours has given.", AWS
    ),
    "FilterLimitExceeded": ErrorKind(
        400,
        "The maximum number of filter values specified on a single call is {limit}.",
        "More filter values than one call may have.",
        AWS,
    ),
    # Instances
    "InvalidInstanceID.Malformed": ErrorKind(
        400,
        'Invalid id: "{instance_id}" (expecting "i-...")',
        "Not of the form i-xxxxxxxx or i-xxxxxxxxxxxxxxxxx.",
        AWS,
    ),
    "InvalidInstanceID.NotFound": ErrorKind(
        400,
        "The instance ID '{instance_id}' does not exist",
        "There is no such instance, or it belongs to another account.",
        AWS,
    ),
    "InvalidInstanceType": ErrorKind(
        400,
        "The instance type is not supported for this request. You can only bundle instance store-backed Windows"
        " instances.",
        "BundleInstance of an instance that is not Windows, or whose root device is an EBS volume.",
        AWS,
    ),
    "IncorrectInstanceState": ErrorKind(
        400,
        "The instance '{instance_id}' is not in a state from which it can be {done}: {why}.",
        "The instance's state does not allow the action, a bundle task has it, its description is not valid, or its"
        " root volume cannot be read; the message says which.",
        f"{AWS}; the words are ours",
    ),
    "OperationNotPermitted": ErrorKind(
        400,
        "{reason}",
        "There is no way to stop the instance: its description has a stateCommand and no stopCommand.",
        f"{AWS}; the choice of code is ours",
    ),
    "UnsupportedOperation": ErrorKind(400, "{what} is not supported.", "StopInstances with Hibernate=true.", AWS),
    # Bundle tasks
    "BundlingInProgress": ErrorKind(
        400,
        "Instance is already being bundled: {bundle_id}",
        "The instance has a bundle task that is not finished. A repeated BundleInstance gets this answer.",
        f"{AWS}; the words are Eucalyptus's",
    ),
    "InvalidBundleID.NotFound": ErrorKind(
        400,
        "The bundle task ID '{bundle_id}' does not exist",
        "There is no such bundle task, it is no longer listed, or it belongs to another account.",
        f"{AWS}; the words are ours",
    ),
    "IncorrectState": ErrorKind(
        400,
        "The bundle task '{bundle_id}' cannot be cancelled: it is {state}.",
        "CancelBundleTask of a task that is complete, failed or being cancelled.",
        f"{AWS}; the choice of code is ours",
    ),
    "InaccessibleStorageLocation": ErrorKind(
        400,
        "The bucket '{bucket}' belongs to another account than the access key '{access_key_id}'.",
        "BundleInstance into a bucket whose owner is not the account of AWSAccessKeyId.",
        f"{AWS}; the choice of code is ours",
    ),
    "ResourceLimitExceeded": ErrorKind(
        400,
        "You have exceeded an Amazon EC2 resource limit. You may have {limit} bundle tasks in progress.",
        "BundleInstance of an account with as many unfinished bundle tasks as `max_tasks_per_account` allows.",
        f"{AWS}; the choice of code is ours",
    ),
    # Ours to mend
    "RequestLimitExceeded": ErrorKind(
        503,
        "Request limit exceeded.",
        "More requests of the account than `max_requests_per_second` and `max_request_burst` allow. SDKs try again.",
        AWS,
    ),
    "Unavailable": ErrorKind(
        503,
        "The service cannot reach what it needs: {said}",
        "BundleInstance while the store fails, or is known to; anything while the hypervisor or the database does not"
        " answer, or a command of the instance fails. SDKs try again.",
        f"{AWS}; the choice of code is ours",
    ),
    "InternalError": ErrorKind(
        500,
        "An internal error has occurred. Retry your request; if the problem persists, report it with the request ID.",
        "Something that nobody foresaw; the log has it under the request ID.",
        AWS,
    ),
}  # fmt: skip


class EC2Error(Exception):
    """An answer that is an error: a row of `ERRORS` with its message filled in.

    Attributes:
        code: EC2's code.
        message: For the caller; never holds a secret.
        status: Of the HTTP answer.
    """

    def __init__(self, code: str, message: str | None = None, /, **fields: object) -> None:
        """Take a code of the table and either the fields of its template or, where it varies, the message itself."""
        kind = ERRORS[code]
        self.code = code
        self.status = kind.status
        self.message = kind.message.format(**fields) if message is None else message
        super().__init__(f"{code}: {self.message}")


# For errors of an instance or its disk image: the code, and why, in words for a caller. The first class in the error's
# method resolution order decides, so every subclass has a row.
_OF_INSTANCES: Mapping[type[Exception], tuple[str, str]] = {
    InstanceNotFound: ("InvalidInstanceID.NotFound", ""),
    InstanceLocked: ("IncorrectInstanceState", "its volume is being read or it is being started; try again later"),
    IncorrectInstanceState: ("IncorrectInstanceState", "its state does not allow it"),
    InvalidDescriptionError: ("IncorrectInstanceState", "its description is not valid; the operator: see the log"),
    InstanceCommandFailed: ("Unavailable", "a command of the instance {instance_id} fails; the operator: see the log"),
    HypervisorError: ("Unavailable", "the hypervisor does not answer, or refuses"),
    InstanceError: ("IncorrectInstanceState", "the hypervisor refuses; the operator: see the log"),
    VolumeError: ("IncorrectInstanceState", "its volume cannot be read; the operator: thrave doctor"),
}


def ec2_error_of(error: Exception) -> EC2Error | None:
    """Return the answer to a request that failed with an error of another package; None if it was not foreseen.

    The answer holds no text of the error, which may name files of the host.
    """
    if is_unavailable(error):
        return EC2Error("Unavailable", said="the database does not answer")
    if isinstance(error, BucketError):
        if error.kind is Kind.TRANSIENT:
            return EC2Error("Unavailable", said=f"the store answers {error.code}")
        return EC2Error("InvalidParameterValue", f"The store refuses the request: {error.code}.")
    row = next((_OF_INSTANCES[kind] for kind in type(error).__mro__ if kind in _OF_INSTANCES), None)
    return None if row is None else _of_instance(getattr(error, "instance_id", ""), *row)


def _of_instance(instance_id: str, code: str, why: str) -> EC2Error:
    if code == "InvalidInstanceID.NotFound":
        return EC2Error("InvalidInstanceID.NotFound", instance_id=instance_id)
    if code == "Unavailable":
        return EC2Error("Unavailable", said=why.format(instance_id=instance_id))
    return EC2Error("IncorrectInstanceState", instance_id=instance_id, done="used", why=why)
