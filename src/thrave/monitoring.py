"""The application of the monitoring listener: health checks with their reasons."""

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from thrave.health import HEALTH_PATHS, HealthCache


class MonitoringApp:
    """ASGI application for health checks, by GET and HEAD. Its clients are operators: it shows errors.

    Args:
        health: Results of the probes of this process.
    """

    def __init__(self, health: HealthCache) -> None:
        self._health = health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        await self._respond(Request(scope, receive))(scope, receive, send)

    def _respond(self, request: Request) -> Response:
        path = request.scope["path"]
        if path not in HEALTH_PATHS:
            return PlainTextResponse(f"There is {', '.join(sorted(HEALTH_PATHS))}.\n", 404)
        if request.method not in {"GET", "HEAD"}:
            return PlainTextResponse("Use GET or HEAD.\n", 405)
        health = self._health.respond(path, with_errors=True)
        return Response(health.body, health.status, {"cache-control": "no-store"}, "application/json")
