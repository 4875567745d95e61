import pytest
import torch.distributed as dist


@pytest.fixture
def process_group():
    """A process group of one rank."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1
    yield
    if made:
        dist.destroy_process_group()
