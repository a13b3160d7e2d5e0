"""The web application of the API: reads an HTTP request, runs an EC2 or STS action, and returns XML.

`Api` runs in the event loop, which only transfers bytes. A thread verifies the signature (`authenticate_request`) and
then runs the action: `handle_request` is the whole order of checks. Unexpected errors become InternalError with a
request id; the details are in the log, never in the response. Nothing here depends on what an action does.
"""

import asyncio
import re
import traceback
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime

import structlog
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from thrave.concurrency import random_bytes
from thrave.ec2.actions import ACTIONS, Action
from thrave.ec2.authentication import Ec2Request, Host, UnreadableRequest, authenticate, read_signature
from thrave.ec2.backend import Caller, Ec2Backend, TooManyRequests
from thrave.ec2.errors import EC2Error, to_ec2_error
from thrave.ec2.protocol import ProtocolError, error_document, parse, serialize
from thrave.ec2.request_threads import AccountThreads
from thrave.ec2.service_models import EC2, SERVICES, STS, Service
from thrave.health import HEALTH_PATHS
from thrave.identity.accounts import AccessKey
from thrave.identity.policies import NO_RESOURCE

MAX_BYTES = 64 * 1024  # of a body, and of a query string
# Larger requests are authenticated by one thread of their own, so that they delay no others. SDKs send less than 2,000.
MAX_SMALL_REQUEST = 8 * 1024  # bytes
FORM = "application/x-www-form-urlencoded"

PATHS = frozenset({"", "/services/compute", "/services/Eucalyptus", "/services/Cloud"})
"""Paths of the API, each with or without a slash at its end. The longer ones are Eucalyptus's."""

# Requests that only read the database have their own threads: they never wait for one that calls a hypervisor. One
# account uses at most one of them. More threads would only compete for the interpreter lock (eight answered a fifth
# fewer requests, measured).
READERS = 2
WORKERS = 40  # threads for all other requests, which mostly wait
MAX_WORKERS_PER_ACCOUNT = 20

READ_TIMEOUT = 20.0  # seconds for a request that only reads the database
BYTES_PER_UNIT = 16 * 1024  # of a response, which cost as much as a small request

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


def create_app(backend: Ec2Backend) -> "Api":
    """Create the web application of the API."""
    return Api(backend)


class Api:
    """ASGI application for EC2's Query API and a part of STS's, by GET and POST.

    Args:
        backend: What the actions use.
    """

    def __init__(self, backend: Ec2Backend) -> None:
        for service in SERVICES:
            _ = service.model  # read now, so that no request waits for it
        self._backend = backend
        self._readers = AccountThreads[bytes]("reader", READERS, max_per_account=1)
        self._workers = AccountThreads[bytes]("worker", WORKERS, max_per_account=MAX_WORKERS_PER_ACCOUNT)
        self._large = ThreadPoolExecutor(1, "large")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        http = HttpRequest(scope, receive)
        await (await self._respond(http))(scope, receive, send)

    async def _respond(self, http: HttpRequest) -> Response:
        if (path := http.scope["path"]) in HEALTH_PATHS and http.method in {"GET", "HEAD"}:
            # From the last results of the probes: no signature, no query. Any client may ask, so errors are not shown.
            health = self._backend.health.respond(path, with_errors=False)
            return Response(health.body, health.status, {"cache-control": "no-store"}, "application/json")
        request_id, service = str(uuid.UUID(bytes=random_bytes(16), version=4)), EC2
        try:
            check_target(http)
            if _is_from_browser(http):
                return Response(_WELCOME.format(url=_url(http)), media_type="text/html")
            request = await read_request(http)
            action = find_action(request)
            service = action.service if action else EC2
            return _xml_response(200, await self._run_in_thread(request, action, request_id), request_id)
        except EC2Error as error:
            return _error_response(service, error, request_id)
        except ClientDisconnect:
            return Response(status_code=400)  # the client does not receive it
        except Exception as error:  # noqa: BLE001  # the last place that can turn an error into a response
            _log_traceback("internal error", error, request_id)
            return _error_response(service, EC2Error("InternalError"), request_id)

    async def _run_in_thread(self, request: Ec2Request, action: Action | None, request_id: str) -> bytes:
        """Authenticate and handle a request in a thread."""
        backend = self._backend
        threads = self._readers if action and action.reads_database_only else self._workers
        future: Future[bytes]
        if request.size > MAX_SMALL_REQUEST:
            key = await asyncio.wrap_future(self._large.submit(authenticate_request, backend, request, request_id))
            future = threads.submit(lambda: key, lambda key: handle_request(backend, request, key, request_id))
        else:
            future = threads.submit(
                lambda: authenticate_request(backend, request, request_id),
                lambda key: handle_request(backend, request, key, request_id),
            )
        try:
            async with asyncio.timeout(READ_TIMEOUT if threads is self._readers else None):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            log.warning("no answer from the database", timeout=READ_TIMEOUT)
            raise EC2Error("Unavailable", reason="the database does not answer") from None


def check_target(http: HttpRequest) -> None:
    """Check path and method of a request.

    Raises:
        EC2Error: InvalidPath, MethodNotAllowed.
    """
    path = http.scope.get("raw_path", b"/").decode("latin-1")
    if path.removesuffix("/") not in PATHS:
        raise EC2Error("InvalidPath", path=path[:_MAX_SHOWN_PATH], url=_url(http))
    if http.method not in {"GET", "POST"}:
        raise EC2Error("MethodNotAllowed", method=http.method, url=_url(http))


async def read_request(http: HttpRequest) -> Ec2Request:
    """Read a request, at most `MAX_BYTES` of its body.

    Raises:
        EC2Error: UnsupportedProtocol (a body that is not a form), RequestEntityTooLarge.
    """
    length = http.headers.get("content-length", "0")
    is_too_long = not length.isdigit() or len(length) > 9 or int(length) > MAX_BYTES
    if is_too_long or len(http.scope["query_string"]) > MAX_BYTES:
        raise EC2Error("RequestEntityTooLarge", limit=MAX_BYTES)
    body = bytearray()
    async for chunk in http.stream():  # a chunked body has no Content-Length
        body += chunk
        if len(body) > MAX_BYTES:
            raise EC2Error("RequestEntityTooLarge", limit=MAX_BYTES)
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


def find_action(request: Ec2Request) -> Action | None:
    """Find the action that a request probably names, to choose the threads; `handle_request` checks it later.

    The undecoded bytes are searched, since decoding is work for a thread.
    """
    for part in (request.query, request.body):
        if found := _ACTION.search(part):
            return ACTIONS.get(found[1].decode())
    return None


def authenticate_request(backend: Ec2Backend, request: Ec2Request, request_id: str) -> AccessKey:
    """Verify a request's signature and return the access key that made it.

    Raises:
        EC2Error: There is no signature, or it is not valid. The log has key id, host and time, never a secret.
    """
    now = backend.now()
    with _only_ec2_errors(request_id):
        try:
            return authenticate(
                request,
                backend.accounts.find_key,
                backend.key_cache,
                now,
                allow_signature_v2=backend.allow_signature_v2,
                check_time=backend.check_request_time,
            )
        except EC2Error as error:
            _log_refusal(request, error, now, request_id)
            raise


def handle_request(backend: Ec2Backend, request: Ec2Request, key: AccessKey, request_id: str) -> bytes:
    """Check an authenticated request, run its action, and return the response as XML.

    Raises:
        EC2Error: The response is an error.
    """
    who = {"account_id": key.account_id, "access_key_id": key.access_key_id, "remote": request.source_ip}
    if key.user is not None:
        who["user"] = key.user.user_name
    with bound_contextvars(request_id=request_id, **who), _only_ec2_errors(request_id):
        backend.rate.take(key.account_id)
        caller = Caller(
            account_id=key.account_id,
            access_key_id=key.access_key_id,
            user=key.user,
            endpoint=request.header("host") or "",
            source_ip=request.source_ip,
            secure_transport=request.is_secure,
        )
        name, version = _check_action_and_version(request)
        action = ACTIONS[name]
        operation = action.service.operation(name)
        parameters = parse(operation, request.form, action.also_required)
        permission = f"{action.service.name}:{name}"
        if not (action.no_permission_needed or backend.is_allowed(caller, permission, NO_RESOURCE)):
            raise EC2Error("UnauthorizedOperation")
        if parameters.get("DryRun"):
            if action.check is not None:
                action.check(backend, caller, parameters)
            raise EC2Error("DryRunOperation")
        with backend.around_action(name, parameters):
            result = action.function(backend, caller, parameters)
        content = serialize(operation, result, version=version, request_id=request_id)
        if len(content) > BYTES_PER_UNIT:
            with suppress(TooManyRequests):  # the action is done: the account's next request is delayed instead
                backend.charge(caller, len(content) // BYTES_PER_UNIT)
        return content


def _check_action_and_version(request: Ec2Request) -> tuple[str, str]:
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


@contextmanager
def _only_ec2_errors(request_id: str) -> Iterator[None]:
    """Turn every exception into an EC2Error; log those that are not the client's."""
    try:
        yield
    except EC2Error:
        raise
    except TooManyRequests:
        raise EC2Error("RequestLimitExceeded") from None
    except ProtocolError as error:
        raise EC2Error(error.code, str(error)) from None
    except UnreadableRequest as error:
        _log_traceback("request cannot be read", error.__cause__ or error, request_id)
        raise EC2Error("InvalidRequest") from None
    except Exception as error:
        ec2_error = to_ec2_error(error)
        if ec2_error is None:
            _log_traceback("internal error", error, request_id)
            raise EC2Error("InternalError") from error
        instance_id = getattr(error, "instance_id", None)
        subject = {"instance_id": instance_id} if instance_id else {}
        cause = getattr(error, "orig", None) or error  # the database driver's message, without SQLAlchemy's advice
        log.warning(
            "request failed", code=ec2_error.code, **subject, kind=type(error).__name__, error=str(cause).strip()
        )
        raise ec2_error from error


def _log_traceback(event: str, error: BaseException, request_id: str) -> None:
    """Log a traceback. The log prints each `where` once and then counts it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno} {type(error).__name__}" if frames else type(error).__name__
    # Only the text: a log renderer that shows local variables would show secrets.
    log.error(event, request_id=request_id, where=where, traceback="".join(traceback.format_exception(error)))


def _log_refusal(request: Ec2Request, error: EC2Error, now: datetime, request_id: str) -> None:
    """Log why authentication failed, with what arrived; the client learns only that the request is refused."""
    claim: dict[str, object] = {}
    with suppress(EC2Error, ProtocolError, UnreadableRequest):
        signature = read_signature(request)
        claim = {"signing": signature.method, "access_key_id": signature.access_key_id}
        with suppress(EC2Error):
            claim["clock_difference"] = f"{(signature.signed_at - now).total_seconds():+.0f} s"
    if error.code == "MissingParameter" and not claim:  # no credentials at all
        return
    if (forwarded := request.header("x-forwarded-host")) is not None:
        claim["x_forwarded_host"] = forwarded
    advice = {"advice": _ADVICE[error.code]} if error.code in _ADVICE else {}
    log.warning(
        "request refused",
        request_id=request_id,
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


def _is_from_browser(http: HttpRequest) -> bool:
    """Whether a person opened the endpoint's URL in a browser."""
    has_no_request = http.method == "GET" and not http.scope["query_string"] and "authorization" not in http.headers
    return has_no_request and "text/html" in http.headers.get("accept", "")


def _url(http: HttpRequest) -> str:
    """The API's URL, as the client that sent a request can reach it."""
    server = http.scope.get("server") or ("localhost", None)
    address = f"{server[0]}:{server[1]}" if server[1] else server[0]
    return f"{http.scope.get('scheme', 'http')}://{Host.parse(http.headers.get('host', '')) or address}"


def _error_response(service: Service, error: EC2Error, request_id: str) -> Response:
    if service is STS and error.code == "AuthFailure":
        error = EC2Error("InvalidClientTokenId")
    document = error_document(service.model, error.code, error.message, status=error.status, request_id=request_id)
    response = _xml_response(error.status, document, request_id)
    if error.code == "MethodNotAllowed":
        response.headers["allow"] = "GET, POST"
    return response


def _xml_response(status: int, content: bytes, request_id: str) -> Response:
    headers = {"x-amzn-requestid": request_id}
    return Response(content, status, headers, media_type="text/xml;charset=UTF-8")
