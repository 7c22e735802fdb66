"""An S3 server on the loopback interface, and a count of what is downloaded."""

import pytest

from scmdm.data import remote as remote_module


@pytest.fixture(scope="session")
def s3():
    """A client of a fresh S3 server with the bucket `bucket`; the environment points streaming and us at it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=environment["S3_ENDPOINT_URL"])
        client.create_bucket(Bucket="bucket")
        yield client
    server.stop()


@pytest.fixture
def downloads(monkeypatch):
    """Names and bytes of what is downloaded."""
    found, download = [], remote_module.download

    def counted(remote, name, to, limit):
        download(remote, name, to, limit)
        found.append((name, to.stat().st_size))

    monkeypatch.setattr(remote_module, "download", counted)
    return found
