import pytest

from tests.adapters import cases


@pytest.fixture(scope="package")
def base(tmp_path_factory):
    """The folder of a tiny pretrained Llama."""
    return cases.save_base(tmp_path_factory.mktemp("base"))
