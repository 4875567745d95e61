"""Low-bit optimizers on what is fine-tuned: small adapters, and parameters of bfloat16."""

from __future__ import annotations

import pytest

from tests.checkpoint.ranks import run
from tests.optim import sharded

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_they_train_and_resume_exactly(tmp_path, ranks):
    first, *_ = run(sharded.low_bit, ranks, str(tmp_path), timeout=400)
    for name, (after, resumed, whole) in first.items():
        assert resumed == after and len(resumed) == 3, name
        assert min(whole[-3:]) < whole[0] - 0.1, name
