"""Connections of the demo's page: their number and the time of a request are bounded."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import BoundedSemaphore, Timer
from typing import Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

_MOST_CONNECTIONS = 32
_SILENCE_S, _REQUEST_S = 10, 30


class RequestHandler(WSGIRequestHandler):
    """Reads one request within a time, however slowly its bytes come; the answer may take longer."""

    timeout = _SILENCE_S

    def setup(self) -> None:
        """Start the time of the request."""
        super().setup()
        self._late = Timer(_REQUEST_S, self._stop_reading)
        self._late.daemon = True
        self._late.start()

    def finish(self) -> None:
        """Close the connection."""
        self._late.cancel()
        with suppress(OSError):  # the other side has gone
            super().finish()

    def _stop_reading(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)


class PageServer(ThreadedWSGIServer):
    """Threaded server that closes connections beyond a number at once."""

    def __init__(self, host: str, port: int, app: Any, descriptor: int) -> None:
        super().__init__(host, port, app, handler=RequestHandler, fd=descriptor)
        self._free = BoundedSemaphore(_MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the request of a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log a broken connection; the application logs its own errors."""
