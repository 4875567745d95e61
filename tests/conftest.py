"""What every test file may rely on."""

import itertools
import logging
import os
import sys

import pytest


def pytest_collection_modifyitems(items):
    """Put files with slow tests first: one that starts last keeps a single worker busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def own_process_group():
    """A file begins without a process group and a run's seed: a trainer not closed leaves both."""
    yield
    torch, seed = sys.modules.get("torch"), sys.modules.get("ditty_di.seed")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if seed is not None:
        seed.set_run_seed(None)


@pytest.fixture
def runtime():
    """One rank, seed 0; tests that want another make their own."""
    from ditty_di.runtime import Runtime

    runtime = Runtime(seed=0)
    yield runtime
    runtime.close()


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
