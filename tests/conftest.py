"""What every test file may rely on."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_process_group():
    """A file begins without a process group: what fails while it is built may leave one behind."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def runtime():
    """One rank, seed 0; tests that want another make their own."""
    from ditty_di.runtime import Runtime

    runtime = Runtime(seed=0)
    yield runtime
    runtime.close()
