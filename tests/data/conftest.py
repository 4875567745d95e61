import itertools
import logging
import os

import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache for all tests of the data part, so that what is slow is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def s3_server():
    """A server of S3 on loopback; the environment of this process and its children names it."""
    pytest.importorskip("s3fs", reason="pip install 'ditty_di[test]'")
    moto = pytest.importorskip("moto.server", reason="pip install 'ditty_di[test]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "one",
        "AWS_SECRET_ACCESS_KEY": "two",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield server
    server.stop()


_buckets = itertools.count()


@pytest.fixture
def s3(s3_server):
    """The URL of an empty bucket."""
    import fsspec

    url = f"s3://bucket-{os.getpid()}-{next(_buckets)}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(url)
    return url
