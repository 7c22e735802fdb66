"""Web server of `scmdm demo`: a page, and an endpoint that denoises.

The server accepts connections from this machine only. To use it over ssh: `ssh -L 7860:localhost:7860 HOST`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any

from scmdm.config.loading import read_config
from scmdm.config.sampling import DenoiseConfig
from scmdm.config.stored import read_stored_config
from scmdm.errors import UserError
from scmdm.integrations.demo.serialization import describe_model, describe_trajectory
from scmdm.integrations.demo.trajectory import record
from scmdm.models.model_files import LoadedModel
from scmdm.sampling.model_loading import load
from scmdm.system.run_directory import CONFIG_FILE
from scmdm.system.terminal import printable, say
from scmdm.system.untrusted import describe, parse_json, reading

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.serving import BaseWSGIServer

_HOST = "127.0.0.1"
_LOCAL = re.compile(rf"(localhost|{re.escape(_HOST)}|\[::1\])(:[0-9]{{1,5}})?", re.IGNORECASE)
_LARGEST_REQUEST = 2**18  # bytes
_MOST_WAITING = 4  # requests that wait for their sample
_INTERRUPTED = 130  # exit status of a process that Ctrl-C ended

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShownModel:
    """A model on the page."""

    name: str
    path: str
    loaded: LoadedModel


def open_models(path: Path, base: Path | None) -> list[ShownModel]:
    """Load the model at `path` and its base, which comes first in the list.

    Without `base`, the base is the one recorded in the run, if it still exists. Raises UserError when the two models
    have different tokenizers or lengths.
    """
    loaded = load(path)
    if not loaded.spec.model.self_conditioned and base is None:
        return [ShownModel("base", str(path), loaded)]
    base = base or recorded_base(loaded.path)
    if base is None:
        return [ShownModel("adapted", str(path), loaded)]
    first = load(base)
    if first.manifest.tokenizer.sha256 != loaded.manifest.tokenizer.sha256 or first.spec.length != loaded.spec.length:
        raise UserError(
            f"{base} and {path} have different tokenizers or lengths; give the base that {path} was adapted from"
        )
    return [ShownModel("base", str(base), first), ShownModel("adapted", str(path), loaded)]


def recorded_base(model: Path) -> Path | None:
    """Base that the model of a directory was adapted from; None if it is unknown or no longer exists."""
    return read_stored_config(model).find("base") if (model / CONFIG_FILE).is_file() else None


def make_app(models: list[ShownModel]) -> Flask:
    """Make the Flask application. Raises UserError when Flask is not installed."""
    try:
        from flask import Flask, jsonify, request
        from werkzeug.exceptions import HTTPException, UnsupportedMediaType
    except ImportError as error:
        raise UserError("the demo needs Flask: pip install 'scmdm[demo]'") from error
    app = Flask("scmdm.integrations.demo", static_folder=str(Path(__file__).parent / "static"), static_url_path="")
    app.config["MAX_CONTENT_LENGTH"] = _LARGEST_REQUEST
    busy = Lock()  # one sample at a time: all models compute on the same device
    waiting = BoundedSemaphore(_MOST_WAITING)

    @app.before_request
    def refuse_other_sites() -> Any:
        host = request.headers.get("Host", "")
        # A page of another site can make its own name point here.
        if not _LOCAL.fullmatch(host) or request.headers.get("Origin", f"http://{host}") != f"http://{host}":
            return jsonify({"error": "this page is served to the browser on this machine only, as localhost"}), 403
        return None

    @app.get("/")
    def page() -> Any:
        return app.send_static_file("page.html")

    @app.get("/models")
    def list_models() -> Any:
        return jsonify([describe_model(shown.name, shown.path, shown.loaded) for shown in models])

    @app.post("/denoise")
    def denoise() -> Any:
        if not request.is_json:  # a form on another site could send other types
            raise UnsupportedMediaType("the Content-Type must be application/json")
        config = read_request(request.get_data(cache=False))
        if not waiting.acquire(blocking=False):
            return jsonify({"error": f"{_MOST_WAITING} samples are being drawn already; try again"}), 503
        try:
            with busy:
                drawn = [(record(shown.loaded, config), shown.loaded.tokenizer) for shown in models]
                return jsonify([describe_trajectory(*one) for one in drawn])
        finally:
            waiting.release()

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return jsonify({"error": printable(error.description or error.name)}), error.code or 500
        if isinstance(error, UserError):
            return jsonify({"error": printable(error)}), 400
        if isinstance(error, OSError):  # a malformed or unfinished body
            return jsonify({"error": printable(describe(error))}), 400
        logger.error("%s", describe(error), exc_info=error)
        return jsonify({"error": printable(describe(error))}), 500

    return app


def read_request(body: bytes) -> DenoiseConfig:
    """Parse the body of a request. Raises UserError for anything but a JSON object of possible keys."""
    with reading("the request", "JSON object"):
        content = parse_json(body)
    if not isinstance(content, dict):
        raise UserError(f"the request is a {type(content).__name__}; it must be a JSON object with keys such as seed")
    return read_config(DenoiseConfig, content, "in the request")


def make_page_server(app: Flask, port: int) -> BaseWSGIServer:
    """Make a server on a local port; 0 chooses a free one. Raises UserError when the port is not available."""
    from scmdm.integrations.demo.connections import PageServer  # needs Flask

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    try:
        # Given a host and port, Werkzeug ends the process when the port is taken.
        with socket.create_server((_HOST, port)) as listening:
            return PageServer(_HOST, listening.getsockname()[1], app, listening.fileno())
    except (OSError, OverflowError) as error:
        raise UserError(f"port={port} is not available ({error}); give another one with --port") from error


def run_demo(path: Path, base: Path | None, port: int) -> None:
    """Serve the page until interrupted, which ends the process."""
    models = open_models(path, base)
    server = make_page_server(make_app(models), port)
    # Threads may be drawing samples then. At exit Python waits for a step, which can take minutes, or ends them inside
    # of torch, which aborts the process. Nothing is written here, so that nothing is lost.
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    if len(models) == 1 and models[0].name == "adapted":
        say("the base of this model is unknown or no longer exists; give --base MODEL to see both side by side")
    say(f"http://localhost:{server.port} shows {' and '.join(shown.path for shown in models)}")
    sys.stdout.flush()
    server.serve_forever()
