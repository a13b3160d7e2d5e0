"""The web application of the API: an HTTP request comes in, an XML answer goes out.

The event loop only moves bytes. A thread proves the signature (`prove`), and only then carries out the action (`act`):
the account's rate → action and version → parameters → permission → DryRun → the action. Requests that are longer than
`SMALL` are proved by a thread of their own, so that they delay no other's. Everything unforeseen becomes InternalError
under a request id; what happened is in the log, and never in the answer. Nothing here knows what any action does.
"""

import asyncio
import re
import traceback
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime

import structlog
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from thrave.ec2.actions import ACTIONS, Action
from thrave.ec2.authentication import Ec2Request, Host, UnreadableRequest, authenticate, read_signature
from thrave.ec2.backend import Caller, Ec2Backend, TooManyRequests
from thrave.ec2.errors import EC2Error, ec2_error_of
from thrave.ec2.protocol import ProtocolError, error_document, parse, serialize
from thrave.ec2.request_threads import AccountThreads
from thrave.ec2.service_models import EC2, SERVICES, STS, Service
from thrave.identity.accounts import AccessKey
from thrave.identity.policies import NO_RESOURCE

LIMIT = 64 * 1024  # bytes of a body, and of a query string
SMALL = 8 * 1024  # bytes of a request that is proved beside others; SDKs send fewer than two thousand
FORM = "application/x-www-form-urlencoded"

PATHS = frozenset({"", "/services/compute", "/services/Eucalyptus", "/services/Cloud"})
"""Where the API answers, each with or without a slash at its end. The longer ones are Eucalyptus's."""

# Requests that only read records have threads of their own: they never wait for one that asks a hypervisor. One account
# has one of them at most. More threads would only take the interpreter's lock from each other (eight answered a fifth
# less, measured).
READERS = 2
WORKERS = 40  # threads for all other requests, which mostly wait
WORKERS_SHARE = 20  # of them, for one account

READ_TIMEOUT = 20.0  # seconds that a request has which only reads records
BYTES_PER_UNIT = 16 * 1024  # of an answer, which cost as much as a small request

_ACTION = re.compile(rb"(?:^|&)Action=([A-Za-z]{1,64})(?:&|$)")
_MAX_SHOWN_PATH = 200  # characters

_WELCOME = """<!DOCTYPE html>
<html lang="en"><title>EC2 API</title>
<h1>This is an EC2 API endpoint</h1>
<p>It is made for EC2 clients, which sign their requests, not for browsers:</p>
<pre>aws --endpoint-url {url} ec2 describe-bundle-tasks</pre>
</html>
"""

log = structlog.get_logger()


class Api:
    """The ASGI application that answers EC2's Query API and as much of STS's, by GET and POST.

    Args:
        door: What the actions use.
    """

    def __init__(self, door: Ec2Backend) -> None:
        for each in SERVICES:
            _ = each.model  # read now, so that no request has to wait for it
        self._door = door
        self._readers = AccountThreads[bytes]("reader", READERS, share=1)
        self._workers = AccountThreads[bytes]("worker", WORKERS, share=WORKERS_SHARE)
        self._large = ThreadPoolExecutor(1, "large")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        http = HttpRequest(scope, receive)
        await (await self._response(http))(scope, receive, send)

    async def _response(self, http: HttpRequest) -> Response:
        request_id, service = str(uuid.uuid4()), EC2
        try:
            check_target(http)
            if _is_browsers(http):
                return Response(_WELCOME.format(url=_url(http)), media_type="text/html")
            request = await receive(http)
            action = find_action(request)
            service = action.service if action else EC2
            return _response(200, await self._answered(request, action, request_id), request_id)
        except EC2Error as error:
            return _error_response(service, error, request_id)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody receives it
        except Exception as error:  # noqa: BLE001  # the one place where nothing may pass
            _log_unforeseen("internal error", error, request_id)
            return _error_response(service, EC2Error("InternalError"), request_id)

    async def _answered(self, request: Ec2Request, action: Action | None, request_id: str) -> bytes:
        """Have a thread prove and answer a request."""
        threads = self._readers if action and action.reads_records else self._workers
        future: Future[bytes]
        if request.size > SMALL:
            proved = await asyncio.wrap_future(self._large.submit(prove, self._door, request, request_id))
            future = threads.submit(lambda: proved, lambda key: act(self._door, request, key, request_id))
        else:
            future = threads.submit(
                lambda: prove(self._door, request, request_id),
                lambda key: act(self._door, request, key, request_id),
            )
        try:
            async with asyncio.timeout(READ_TIMEOUT if threads is self._readers else None):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            log.warning("no answer from the database", timeout=READ_TIMEOUT)
            raise EC2Error("Unavailable", said="the database does not answer") from None


def create_app(door: Ec2Backend) -> Api:
    """Make the web application of the API."""
    return Api(door)


def find_action(request: Ec2Request) -> Action | None:
    """Return the action that a request seems to name, which decides who reads it; whether it may is seen later.

    It is looked for in the bytes as they came: nothing is decoded before a thread does it.
    """
    for part in (request.query, request.body):
        if found := _ACTION.search(part):
            return ACTIONS.get(found[1].decode())
    return None


def prove(door: Ec2Backend, request: Ec2Request, request_id: str) -> AccessKey:
    """Prove who has signed a request.

    Raises:
        EC2Error: It is not signed, or not as it must be. The log says of which key, host and time, never a secret.
    """
    now = door.now()
    try:
        return authenticate(request, door.accounts.find_key, door.recent_keys, now, version_2=door.version_2)
    except EC2Error as error:
        _log_refusal(request, error, now)
        raise
    except ProtocolError as error:
        raise EC2Error(error.code, str(error)) from None
    except UnreadableRequest as error:
        _log_unforeseen("request cannot be read", error.__cause__ or error, request_id)
        raise EC2Error("InvalidRequest") from None
    except Exception as error:
        ours = _ours(error, request_id)
        raise ours from error


def act(door: Ec2Backend, request: Ec2Request, key: AccessKey, request_id: str) -> bytes:
    """Answer a request whose signature is proved: every other check in its order, then the action.

    Raises:
        EC2Error: The answer is an error.
    """
    try:
        return _carry_out(door, request, key, request_id)
    except EC2Error:
        raise
    except TooManyRequests:
        raise EC2Error("RequestLimitExceeded") from None
    except ProtocolError as error:
        raise EC2Error(error.code, str(error)) from None
    except Exception as error:
        ours = _ours(error, request_id)
        raise ours from error


def _carry_out(door: Ec2Backend, request: Ec2Request, key: AccessKey, request_id: str) -> bytes:
    door.rate.take(key.account_id)
    caller = _caller(request, key)
    name, version = _action_and_version(request)
    action = ACTIONS[name]
    operation = action.service.operation(name)
    parameters = parse(operation, request.form, action.also_required)
    if not (action.for_all or door.may(caller, f"{action.service.name}:{name}", NO_RESOURCE)):
        raise EC2Error("UnauthorizedOperation")
    if parameters.get("DryRun"):
        if action.check is not None:
            action.check(door, caller, parameters)
        raise EC2Error("DryRunOperation")
    content = serialize(operation, action.function(door, caller, parameters), version=version, request_id=request_id)
    if len(content) > BYTES_PER_UNIT:
        with suppress(TooManyRequests):  # it has been done, so the next request pays
            door.charge(caller, len(content) // BYTES_PER_UNIT)
    return content


def check_target(http: HttpRequest) -> None:
    """Check that a request is for the API.

    Raises:
        EC2Error: InvalidPath, MethodNotAllowed.
    """
    path = http.scope.get("raw_path", b"/").decode("latin-1")
    if path.removesuffix("/") not in PATHS:
        raise EC2Error("InvalidPath", path=path[:_MAX_SHOWN_PATH], url=_url(http))
    if http.method not in {"GET", "POST"}:
        raise EC2Error("MethodNotAllowed", method=http.method, url=_url(http))


async def receive(http: HttpRequest) -> Ec2Request:
    """Read a request, never more of it than the limit.

    Raises:
        EC2Error: UnsupportedProtocol (a body that is not a form), RequestEntityTooLarge.
    """
    length = http.headers.get("content-length", "0")
    if len(http.scope["query_string"]) > LIMIT or not length.isdigit() or len(length) > 9 or int(length) > LIMIT:
        raise EC2Error("RequestEntityTooLarge", limit=LIMIT)
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > LIMIT:
            raise EC2Error("RequestEntityTooLarge", limit=LIMIT)
    if body and http.headers.get("content-type", FORM).partition(";")[0].strip().lower() != FORM:
        raise EC2Error("UnsupportedProtocol")
    return Ec2Request(
        method=http.method,
        path=http.scope.get("raw_path", b"/").decode("latin-1"),
        query=http.scope["query_string"],
        headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in http.scope["headers"]),
        body=bytes(body),
        source_ip=http.client and http.client.host,
        is_secure=http.scope.get("scheme") == "https",
    )


def _is_browsers(http: HttpRequest) -> bool:
    """Whether a person has opened the endpoint's URL in a browser."""
    is_bare = http.method == "GET" and not http.scope["query_string"] and "authorization" not in http.headers
    return is_bare and "text/html" in http.headers.get("accept", "")


def _url(http: HttpRequest) -> str:
    """The API's URL, as the client that sent a request can reach it."""
    server = http.scope.get("server") or ("localhost", None)
    own = f"{server[0]}:{server[1]}" if server[1] else server[0]
    return f"{http.scope.get('scheme', 'http')}://{Host.parse(http.headers.get('host', '')) or own}"


def _caller(request: Ec2Request, key: AccessKey) -> Caller:
    return Caller(
        account_id=key.account_id,
        access_key_id=key.access_key_id,
        user=key.user,
        endpoint=request.header("host") or "",
        source_ip=request.source_ip,
        secure_transport=request.is_secure,
    )


def _action_and_version(request: Ec2Request) -> tuple[str, str]:
    for name in ("Action", "Version"):
        if name not in request.form:
            raise EC2Error("MissingParameter", name=name)
    name, version = request.form["Action"], request.form["Version"]
    if name not in ACTIONS:
        raise EC2Error("InvalidAction", action=name)
    service = ACTIONS[name].service
    if not service.is_known_version(version):
        oldest, newest = service.oldest_version, service.newest_version
        raise EC2Error("NoSuchVersion", version=version, oldest=oldest, newest=newest)
    return name, version


def _ours(error: Exception, request_id: str) -> EC2Error:
    """Return the answer to a request that failed with an error of another package, once the log has it."""
    ours = ec2_error_of(error)
    if ours is None:
        _log_unforeseen("internal error", error, request_id)
        return EC2Error("InternalError")
    instance_id = getattr(error, "instance_id", None)
    about = {"instance_id": instance_id} if instance_id else {}
    reason = getattr(error, "orig", None) or error  # a driver's words, without SQLAlchemy's advice
    log.warning("request failed", code=ours.code, **about, kind=type(error).__name__, error=str(reason).strip())
    return ours


def _log_unforeseen(event: str, error: BaseException, request_id: str) -> None:
    """Log a traceback; `where` tells one fault from another, and each is written once and then counted."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno} {type(error).__name__}" if frames else type(error).__name__
    # The text alone: a renderer of the log that shows local variables would show secrets.
    log.error(event, request_id=request_id, where=where, traceback="".join(traceback.format_exception(error)))


def _log_refusal(request: Ec2Request, error: EC2Error, now: datetime) -> None:
    """Tell the operator who could not be let in, and what arrived: a client is told no more than that it is refused."""
    claim: dict[str, object] = {}
    with suppress(EC2Error, ProtocolError, UnreadableRequest):
        signature = read_signature(request)
        claim = {"signing": signature.way, "access_key_id": signature.access_key_id}
        with suppress(EC2Error):
            claim["clock_difference"] = f"{(signature.signed_at - now).total_seconds():+.0f} s"
    if error.code == "MissingParameter" and not claim:  # no credentials at all
        return
    if (forwarded := request.header("x-forwarded-host")) is not None:
        claim["x_forwarded_host"] = forwarded
    advice = {"advice": _ADVICE[error.code]} if error.code in _ADVICE else {}
    log.warning(
        "request refused",
        code=error.code,
        reason=error.message,
        host=request.header("host"),
        remote=request.source_ip,
        **claim,
        **advice,
    )


_ADVICE: Mapping[str, str] = {
    "AuthFailure": "The key is unknown or inactive, the secret differs, or something in front of the service changes"
    " the request: a proxy must pass on the Host header as the client has sent it.",
    "RequestExpired": "Set the clock of the client, or of this host.",
}


def _error_response(service: Service, error: EC2Error, request_id: str) -> Response:
    if service is STS and error.code == "AuthFailure":
        error = EC2Error("InvalidClientTokenId")
    document = error_document(service.model, error.code, error.message, status=error.status, request_id=request_id)
    response = _response(error.status, document, request_id)
    if error.code == "MethodNotAllowed":
        response.headers["allow"] = "GET, POST"
    return response


def _response(status: int, content: bytes, request_id: str) -> Response:
    headers = {"x-amzn-requestid": request_id}
    return Response(content, status, headers, media_type="text/xml;charset=UTF-8")
