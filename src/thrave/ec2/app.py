"""The front door itself: an HTTP request comes in, an XML answer goes out.

`answer` is the whole of it, in the order of the checks. Everything unforeseen becomes InternalError under a request id;
what happened is in the log, and never in the answer. Nothing here knows what any action does.
"""

import asyncio
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from thrave.compute.errors import HypervisorGoneError
from thrave.ec2.actions import ACTIONS, Action
from thrave.ec2.door import Caller, Door
from thrave.ec2.errors import EC2Error
from thrave.ec2.messages import Request
from thrave.ec2.model import EC2, SERVICES, STS, Service
from thrave.ec2.protocol import ProtocolError, error_document, parse, serialize
from thrave.ec2.rate import TooManyRequests
from thrave.ec2.signatures import authenticate
from thrave.identity.decisions import NO_RESOURCE
from thrave.identity.keys import AccessKey

LIMIT = 64 * 1024  # bytes of a body, and of a query string
FORM = "application/x-www-form-urlencoded"

# Requests that only read records have a thread of their own: they never wait for one that asks a hypervisor, and a
# second such thread would only take the interpreter's lock from the first (eight answered a fifth less, measured).
READERS = 1
WORKERS = 40  # threads for all other requests, which mostly wait

log = structlog.get_logger()


def create_app(door: Door) -> Starlette:
    """Make the web application that answers EC2's Query API and as much of STS's, by GET and POST, at `/`."""
    for each in SERVICES:
        _ = each.model  # read now, so that no request has to wait for it
    readers, workers = ThreadPoolExecutor(READERS, "reader"), ThreadPoolExecutor(WORKERS, "worker")

    async def endpoint(http: HttpRequest) -> Response:
        request_id, service = str(uuid.uuid4()), EC2
        try:
            request = await receive(http)
            action = named(request)
            service = action.service if action else EC2
            threads = readers if action and action.reads_records else workers
            content = await asyncio.get_running_loop().run_in_executor(threads, answer, door, request, request_id)
            return _response(200, content, request_id)
        except EC2Error as error:
            return _error_response(service, error, request_id)
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        except Exception:  # noqa: BLE001  # the one place where nothing may pass
            # The text alone: a renderer of the log that shows local variables would show secrets.
            log.error("internal error", request_id=request_id, traceback=traceback.format_exc())  # noqa: TRY400
            return _error_response(service, EC2Error("InternalError"), request_id)

    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])


def named(request: Request) -> Action | None:
    """Give the action that a request names, if there is one of that name; whether it may is seen later."""
    with suppress(ProtocolError):
        return ACTIONS.get(request.form.get("Action", ""))
    return None


def answer(door: Door, request: Request, request_id: str) -> bytes:
    """Answer one request: every check in its order, then the action.

    Raises:
        EC2Error: The answer is an error.
    """
    try:
        key = authenticate(request, door.accounts.find_key, door.recent_keys, door.now())
        door.rate.take(key.account_id)
        caller = _caller(request, key)
        name, version = _action_and_version(request)
        action = ACTIONS[name]
        operation = action.service.operation(name)
        parameters = parse(operation, request.form, action.also_required)
        if not (action.for_all or door.may(caller, f"{action.service.name}:{name}", NO_RESOURCE)):
            raise EC2Error("UnauthorizedOperation")
        if parameters.get("DryRun"):
            raise EC2Error("DryRunOperation")
        result = action.function(door, caller, parameters)
    except TooManyRequests:
        raise EC2Error("RequestLimitExceeded") from None
    except ProtocolError as error:
        raise EC2Error(error.code, str(error)) from None
    except HypervisorGoneError as error:
        log.warning("the hypervisor is gone", request_id=request_id, reason=str(error))
        raise EC2Error("Unavailable", said="the hypervisor does not answer") from None
    return serialize(operation, result, version=version, request_id=request_id)


def _caller(request: Request, key: AccessKey) -> Caller:
    return Caller(
        account_id=key.account_id,
        access_key_id=key.access_key_id,
        user=key.user,
        endpoint=request.header("host") or "",
        source_ip=request.source_ip,
        secure_transport=request.is_secure,
    )


def _action_and_version(request: Request) -> tuple[str, str]:
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


async def receive(http: HttpRequest) -> Request:
    """Read a request, never more of it than the limit.

    Raises:
        EC2Error: UnsupportedProtocol (a body that is not a form), RequestEntityTooLarge.
    """
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > LIMIT:
            raise EC2Error("RequestEntityTooLarge", limit=LIMIT)
    if len(http.scope["query_string"]) > LIMIT:
        raise EC2Error("RequestEntityTooLarge", limit=LIMIT)
    if body and http.headers.get("content-type", FORM).partition(";")[0].strip().lower() != FORM:
        raise EC2Error("UnsupportedProtocol")
    return Request(
        method=http.method,
        path=http.scope.get("raw_path", b"/").decode("latin-1"),
        query=http.scope["query_string"],
        headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in http.scope["headers"]),
        body=bytes(body),
        source_ip=http.client and http.client.host,
        is_secure=http.scope.get("scheme") == "https",
    )


def _error_response(service: Service, error: EC2Error, request_id: str) -> Response:
    if service is STS and error.code == "AuthFailure":
        error = EC2Error("InvalidClientTokenId")
    document = error_document(service.model, error.code, error.message, status=error.status, request_id=request_id)
    return _response(error.status, document, request_id)


def _response(status: int, content: bytes, request_id: str) -> Response:
    headers = {"x-amzn-requestid": request_id}
    return Response(content, status, headers, media_type="text/xml;charset=UTF-8")
