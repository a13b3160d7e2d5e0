"""An ASGI application behind a real HTTP server, for as long as a block lasts."""

import threading
import time
from contextlib import contextmanager

import uvicorn

PATIENCE = 5  # seconds for requests under way, when the block has ended


@contextmanager
def serving(app):
    """Serve an application on a free port of 127.0.0.1; give its URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=PATIENCE
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
