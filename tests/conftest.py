import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An S3-compatible server on loopback, its credentials in the environment."""
    from object_store_samples import Server

    chain = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):  # not those of whoever runs the tests
        chain[name] = str(tmp_path_factory.mktemp("aws") / "empty")
        Path(chain[name]).touch()
    before = {name: os.environ.get(name) for name in (*chain, "AWS_PROFILE", "AWS_ENDPOINT_URL")}
    os.environ.pop("AWS_PROFILE", None)
    os.environ.pop("AWS_ENDPOINT_URL", None)
    os.environ.update(chain)
    server = Server()
    yield server
    server.stop()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def proxy(server):
    """A way to the server on which faults may happen."""
    from object_store_samples import Proxy

    proxy = Proxy(server)
    yield proxy
    proxy.stop()
