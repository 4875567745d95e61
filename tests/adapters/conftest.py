import pytest

from tests.adapters import cases


@pytest.fixture(scope="package")
def base(tmp_path_factory):
    """The folder of a tiny pretrained Llama; beside it one with tied weights, `...-tied`."""
    folder = tmp_path_factory.mktemp("base")
    cases.save_base(folder.with_name(f"{folder.name}-tied"), tie=True)
    return cases.save_base(folder)
