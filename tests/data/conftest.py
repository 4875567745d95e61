import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache for all tests of the data part, so that what is slow is built once."""
    return tmp_path_factory.mktemp("cache")
