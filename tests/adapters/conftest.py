import pytest

from tests.adapters import cases


@pytest.fixture(scope="package")
def base(tmp_path_factory):
    """The folder of a tiny pretrained Llama; beside it those of `cases.BASES`."""
    folder = tmp_path_factory.mktemp("base")
    cases.save_base(folder.with_name(f"{folder.name}-tied"), tie=True)
    cases.save_experts(folder.with_name(f"{folder.name}-experts"))
    return cases.save_base(folder)
