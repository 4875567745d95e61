"""Classification by commands: from labeled lines to a model that stock transformers opens."""

import json

import pytest
from transformers import pipeline

from tests import warm

LINES = [{"text": f"{i} {'+' * (i % 7)}", "label": ["even", "odd"][i % 2]} for i in range(60)]
SMALL = ["+experiment=sequence_classification", "data.path=rows.jsonl", "data.seq_len=16"]


def run(folder, *arguments):
    done = warm.run(["-m", "ditty_di", *arguments], cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    code, said = run(path, *SMALL, "adapter=null", "max_steps=2", "run=RUN")
    assert code == 0, said
    assert "task=export" not in said and "task=generate" not in said, "it could not answer"
    return path


def test_a_run_reports_its_scores_and_exports_its_labels(folder):
    result = json.loads((folder / "RUN" / "result.json").read_text())
    assert 0 <= result["validation/accuracy"] <= 1 and 0 <= result["validation/f1"] <= 1
    classify = pipeline("text-classification", model=str(folder / "RUN" / "export"))
    assert {found["label"] for found in classify(["1 +", "2 ++"])} <= {"even", "odd"}
    code, said = run(folder, "run=RUN", "task=evaluate")
    assert code == 0, said
    for name in ("accuracy", "f1"):
        line = next(line for line in said.splitlines() if line.startswith(f"{name} "))
        assert float(line.split()[1]) == pytest.approx(result[f"validation/{name}"], abs=1e-6)


def test_it_gives_no_text(folder):
    code, said = run(folder, "run=RUN", "task=generate", "prompt=1")
    assert code and "the run trained a LlamaForSequenceClassification, which gives no text" in said
    assert "Traceback" not in said
    code, said = run(folder, "task=generate_folder", "folder=RUN/export", "prompt=1")
    assert code and "LlamaForSequenceClassification, which give no text" in said
    assert "Traceback" not in said


def test_a_bad_line_is_found_before_anything_is_trained(folder):
    good = [json.dumps({"text": f"{n}", "label": n % 2}) for n in range(8)]
    (folder / "bad.jsonl").write_text("\n".join([good[0], '{"text": "b"}', *good[1:]]) + "\n")
    code, said = run(folder, *SMALL[:1], "data.path=bad.jsonl", "task=check")
    assert code and 'bad.jsonl:2: no "label"' in said and "Traceback" not in said
