"""Serves an ASGI application over real HTTP for the duration of a block."""

import threading
from contextlib import contextmanager

import uvicorn

from support.eventually import eventually

SHUTDOWN_TIMEOUT = 5  # seconds for requests that are not finished when the block ends


@contextmanager
def serving(app):
    """Serve an application on a free port of 127.0.0.1; return its URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started, "uvicorn has started")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
