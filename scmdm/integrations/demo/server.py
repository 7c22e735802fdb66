"""Web server of `scmdm demo`: a page, and an endpoint that denoises.

The server accepts connections from this machine only. To use it over ssh: `ssh -L 7860:localhost:7860 HOST`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import yaml

from scmdm.config.loading import read_config
from scmdm.config.sampling import DenoiseConfig
from scmdm.errors import UserError
from scmdm.integrations.demo.serialization import describe_model, describe_trajectory
from scmdm.integrations.demo.trajectory import record
from scmdm.models.model_files import LoadedModel
from scmdm.sampling.generation import load
from scmdm.system.terminal import say

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.serving import BaseWSGIServer

_HOST = "127.0.0.1"


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
    base = base or recorded_base(path)
    if base is None:
        return [ShownModel("adapted", str(path), loaded)]
    first = load(base)
    if first.manifest.tokenizer.sha256 != loaded.manifest.tokenizer.sha256 or first.spec.length != loaded.spec.length:
        raise UserError(
            f"{base} and {path} have different tokenizers or lengths; give the base that {path} was adapted from"
        )
    return [ShownModel("base", str(base), first), ShownModel("adapted", str(path), loaded)]


def recorded_base(path: Path) -> Path | None:
    """Base that a run, or the run of a checkpoint, was adapted from; None if it is unknown or no longer exists."""
    for run in (path, path.resolve().parent.parent):
        config = run / "config.yaml"
        if config.is_file():
            base = yaml.safe_load(config.read_text()).get("base")
            return Path(base) if base is not None and Path(base).exists() else None
    return None


def make_app(models: list[ShownModel]) -> Flask:
    """Make the Flask application. Raises UserError when Flask is not installed."""
    try:
        from flask import Flask, jsonify, request
    except ImportError as error:
        raise UserError("the demo needs Flask: pip install 'scmdm[demo]'") from error
    app = Flask("scmdm.integrations.demo", static_folder=str(Path(__file__).parent / "static"), static_url_path="")
    busy = Lock()  # one sample at a time: all models compute on the same device

    @app.get("/")
    def page() -> Any:
        return app.send_static_file("page.html")

    @app.get("/models")
    def list_models() -> Any:
        return jsonify([describe_model(shown.name, shown.path, shown.loaded) for shown in models])

    @app.post("/denoise")
    def denoise() -> Any:
        # get_json refuses other content types, so that a form on another site cannot post here.
        content = request.get_json()
        try:
            config = read_config(DenoiseConfig, _as_keys(content), "in the request")
            with busy:
                return jsonify([_denoised(shown, config) for shown in models])
        except UserError as error:
            return jsonify({"error": str(error)}), 400

    return app


def _as_keys(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"the request is a {type(content).__name__}; it must be a JSON object with keys such as seed")
    return content


def _denoised(shown: ShownModel, config: DenoiseConfig) -> Mapping[str, Any]:
    return describe_trajectory(record(shown.loaded, config), shown.loaded.tokenizer)


def make_page_server(app: Flask, port: int) -> BaseWSGIServer:
    """Make a server on a local port; 0 chooses a free one. Raises UserError when the port is not available."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    try:
        # Given a host and port, Werkzeug ends the process when the port is taken.
        with socket.create_server((_HOST, port)) as listening:
            return make_server(_HOST, listening.getsockname()[1], app, threaded=True, fd=listening.fileno())
    except (OSError, OverflowError) as error:
        raise UserError(f"port={port} is not available ({error}); give another one with --port") from error


def run_demo(path: Path, base: Path | None, port: int) -> None:
    """Serve the page until interrupted."""
    models = open_models(path, base)
    server = make_page_server(make_app(models), port)
    if len(models) == 1 and models[0].name == "adapted":
        say("the base of this model is unknown or no longer exists; give --base MODEL to see both side by side")
    say(f"http://localhost:{server.port} shows {' and '.join(shown.path for shown in models)}")
    server.serve_forever()
