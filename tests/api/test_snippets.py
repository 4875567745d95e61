"""The Python that the folder's README shows, run from top to bottom in one process."""

from __future__ import annotations

import json
import re

import pytest

from tests.api.cases import ROOT, python


@pytest.mark.slow
def test_every_snippet_runs(tmp_path):
    text = (ROOT / "ditty_di" / "api" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 10
    texts = [{"text": f"def f{i}(x):\n    return x + {i}" if i % 4 else "short"} for i in range(40)]
    (tmp_path / "my_texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "program.py").write_text("\n".join(snippets) + "\nprint(type(model).__name__)")
    printed = python(
        tmp_path,
        "program.py",
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
        # inductor now and then links a kernel wrongly, and keeps it for all who share its cache
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"),
    )
    refused, *_, last = printed.splitlines()
    assert last == "MyModel"
    assert "mask" in printed and "normalize" in printed, refused
    for folder, weights in {"output": "model", "tuned": "adapter_model"}.items():
        assert (tmp_path / folder / "export" / f"{weights}.safetensors").exists()
        assert (tmp_path / folder / "metrics.jsonl").exists()
        assert list((tmp_path / folder / "checkpoints").glob("step-*"))


def test_transformer_engine_says_in_one_sentence_that_it_is_missing():
    from torch import nn

    from ditty_di.api import ModelFactory
    from ditty_di.precision import transformer_engine

    factory = ModelFactory.from_instance(nn.Linear(16, 16), transform=transformer_engine.convert)
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError, RuntimeError):
        with pytest.raises(ImportError, match="pip install 'ditty_di"):
            factory.build()
