"""The demo's server survives any request, refuses other sites, and ends on Ctrl-C while it draws a sample."""

import http.client
import json
import signal
import socket
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scmdm.errors import UserError
from scmdm.integrations.demo import connections
from scmdm.integrations.demo.server import make_app, make_page_server, open_models, recorded_base
from tests.conftest import scmdm

TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def port(adapted):
    """A live server of a small model."""
    server = make_page_server(make_app(open_models(adapted, None)), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.port
    server.shutdown()
    thread.join()


def ask(port, body=b"", method="POST", path="/denoise", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, TYPE if headers is None else headers)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def refusal(status, content):
    return status == 400 and "\n" not in content["error"] and len(content["error"]) < 3000


NESTED = b"[" * 100_000
BODIES = [
    b"",
    b"[]",
    b"null",
    b"1",
    b'"text"',
    b"{",
    b"\xff\xfe",
    b"nul",
    NESTED,
    NESTED + b"]" * 100_000,
    b'{"sampler":' * 1000 + b"1" + b"}" * 1000,
    b'{"seed": NaN}',
    b'{"seed": Infinity}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"seed": 1e3000}',
    b'{"seed": 1, "seed": 2}',
    b'{"seed": -1}',
    b'{"seed": 9223372036854775808}',
    b'{"seed": [1]}',
    b'{"sampler": {"temperature": 1e999}}',
    b'{"sampler": {"temperature": NaN}}',
    b'{"sampler": {"temperature": -1}}',
    b'{"sampler": {"steps": 1025}}',
    b'{"sampler": {"steps": 9223372036854775808}}',
    b'{"sampler": {"steps": true}, "prompt": {}}',
    b'{"sampler": {"block_length": 9223372036854775808}}',
    b'{"sampler": {"kind": "${oc.env:HOME}"}}',
    b'{"sampler": "${oc.env:HOME}"}',
    b'{"sampler": []}',
    b'{"sampler": null}',
    b'{"prompt": "\\\\${oc.env:HOME}"}',
    b'{"prompt": "\\u0000"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": {' + b",".join(b'"a%d": 0' % index for index in range(5000)) + b"}}",
    b'{"num": 1000000000}',
    b'{"length": 1000000000}',
]


@pytest.mark.parametrize("body", BODIES, ids=[repr(body[:30]) for body in BODIES])
def test_no_body_is_more_than_refused(port, body, monkeypatch):
    monkeypatch.setenv("HOME", "SECRET")
    status, content = ask(port, body)
    assert refusal(status, content) and "SECRET" not in content["error"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
SAMPLER = ["kind", "steps", "temperature", "top_k", "top_p", "block_length", "remask", "label", "guidance", "carry"]
KEYS = st.sampled_from(["seed", "prompt", "infill", "sampler", "num"])
BODY = st.dictionaries(KEYS, VALUES | st.dictionaries(st.sampled_from(SAMPLER), VALUES), max_size=3) | VALUES


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODY)
def test_any_json_is_answered(port, content):
    status, found = ask(port, json.dumps(content).encode())
    assert status == 200 or refusal(status, found)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example.com"},
        {"Host": "evil.example.com:7860"},
        {"Host": "localhost.evil.example.com"},
        {"Host": "localhost@evil.example.com"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Host": "localhost#.evil.example.com"},
        {"Host": "localhost/.evil.example.com"},
        {"Host": "localhost?evil.example.com"},
        {"Host": "evil.example.com@localhost"},
        {"Host": "localhost:"},
        {"Origin": "http://evil.example.com"},
        {"Origin": "null"},
        {"Origin": "https://localhost:1"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/models"), ("GET", "/"), ("POST", "/denoise")])
def test_other_sites_are_refused(port, headers, method, path):
    assert ask(port, b"{}", method, path, TYPE | headers)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:80", "LOCALHOST"])
def test_this_machine_is_served_by_its_names(port, host):
    assert ask(port, b"", "GET", "/models", {"Host": host, "Origin": f"http://{host}"})[0] == 200


def raw(port, data):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


POST = b"POST /denoise HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        POST + b"\r\n",
        POST + b"Content-Length: x\r\n\r\n{}",
        POST + b"Content-Length: -1\r\n\r\n{}",
        POST + b"Content-Length: 100\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{",
    ],
)
def test_a_malformed_body_is_refused(port, data):
    assert raw(port, data).split(b" ")[1] == b"400"


def test_a_large_body_is_refused(port):
    assert raw(port, POST + b"Content-Length: 1000000000\r\n\r\n").split(b" ")[1] == b"413"
    endless = b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 8
    assert raw(port, POST + endless).split(b" ")[1] in (b"400", b"413")


def test_chunks_are_read(port):
    assert raw(port, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n").split(b" ")[1] == b"200"


def test_silent_connections_end_and_leave_room(adapted, monkeypatch):
    monkeypatch.setattr(connections, "_MOST_CONNECTIONS", 3)
    monkeypatch.setattr(connections, "_REQUEST_S", 0.3)
    server = make_page_server(make_app(open_models(adapted, None)), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(8)]
        for connection in silent:
            assert connection.recv(1) == b""
            connection.close()
        assert ask(server.port, b"", "GET", "/models")[0] == 200
    finally:
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("text", ["base: ''", 'base: "a\\0b"', "base: none"])
def test_a_base_is_recorded_or_unknown(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert recorded_base(tmp_path) is None


@pytest.mark.parametrize("text", ["[]", "null", "base: [1]", "base: {a: b}"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        recorded_base(tmp_path)


def test_trajectories_are_bounded(adapted, monkeypatch):
    models = open_models(adapted, None)
    monkeypatch.setattr("scmdm.integrations.demo.trajectory._MOST_SHOWN", 24 * 10)
    client = make_app(models).test_client()
    ranked = {"kind": "confidence", "steps": 1}
    refused = [{"steps": 11}, {"kind": "first_hitting"}, {**ranked, "threshold": 0.9}, {**ranked, "factor": 1.0}]
    assert [client.post("/denoise", json={"sampler": keys}).status_code for keys in refused] == [400] * 4
    assert client.post("/denoise", json={"sampler": {"steps": 10}}).status_code == 200


@pytest.mark.slow
def test_the_command_ends_on_ctrl_c_while_it_draws(adapted):
    process = scmdm("demo", adapted, "--port", 0)
    try:
        port = int(process.stdout.readline().split()[0].rpartition(":")[2])
        body = b'{"sampler": {"steps": 1024}}'
        # The first is drawn, which takes seconds, and the others wait.
        clients = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(3)]
        for client in clients:
            client.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=180)
        for client in clients:
            client.close()
        assert process.returncode == 130 and not error.strip()
    finally:
        process.kill()
