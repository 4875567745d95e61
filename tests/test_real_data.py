"""launch/real-data at the size of a megabyte: every step that the how-to shows."""

from __future__ import annotations

import pytest

from tests.toy import measured


@pytest.mark.slow
def test_real_text_is_tokenized_looked_at_and_trained_on(tmp_path):
    small = "--megabytes 0.6 --vocab-size 500 --steps 3 --rows 100 --workers 1"
    options = [*small.split(), "--folder", str(tmp_path / "work")]
    found = measured("real_data", *options, report=tmp_path / "report.json")["results"]
    assert sum(found["text"][name]["bytes"] for name in ("debian", "manual", "python")) >= 600_000
    assert found["text"]["python"]["documents"] > 0
    steps = {row["step"]: row for row in found["steps"]}
    assert all(row["tokens_per_second"] > 0 for row in steps.values()), steps
    assert steps["tokenize"]["tokens"] > 100_000 and steps["stats"]["rows"] == 100
    assert 0 <= steps["train a model"]["data_loading_share"] < 1
    two = found["two_namespaces"]
    if "skipped" in two:
        pytest.skip(two["skipped"])
    assert len(two["sha256"]) == 64  # compared by the script
