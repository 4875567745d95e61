"""From a LoRA run to answers: out of the run, its adapters, and a merged model."""

import json

import pytest

from ditty_di.export.load import open_model, open_tokenizer
from ditty_di.tasks.generate import generate
from tests.export import cases
from tests.warm import ditty_di


def answers(path):
    return [json.loads(line) for line in path.open()]


@pytest.mark.slow
def test_a_run_its_adapters_and_a_merged_model_answer_alike(tokenizer, tmp_path):
    cases.llama(tmp_path / "base", tokenizer, initializer_range=0.05)
    for split, numbers in (("train", range(50)), ("val", range(50, 60)), ("test", range(60, 65))):
        (tmp_path / "pairs" / split).mkdir(parents=True)
        pairs = [{"input": f"{i}", "output": f"says that {i + 1} follows"} for i in numbers]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (tmp_path / "pairs" / split / "a.jsonl").write_text(text)
    form = "Q: Document __input__ A:"
    ditty_di(
        tmp_path,
        "run=RUN",
        "model=hf_causal_lm",
        "model.path=base",
        "adapter=lora",
        "data=jsonl",
        "data.path=pairs",
        "data.seq_len=64",
        f"data.input_format='{form}'",
        "max_steps=12",
        "validator=loss_only",
        "export=adapter",
    )
    asking = ["prompts=pairs/test/a.jsonl", "max_new_tokens=12"]
    ditty_di(tmp_path, "run=RUN", "task=generate", *asking, "output=run.jsonl")
    ditty_di(
        tmp_path, "run=RUN", "task=export", "export=merged", "export.path=M", "export.dtype=float32"
    )
    for folder in ("RUN/export", "M"):
        generate(
            open_model(str(tmp_path / folder)),
            open_tokenizer(str(tmp_path / folder)),
            prompts=str(tmp_path / "pairs" / "test" / "a.jsonl"),
            output=str(tmp_path / folder / "answers.jsonl"),
            input_format=form,
            max_new_tokens=12,
            batch_size=2,
            device="cpu",
        )
    run, adapter, merged = (
        answers(tmp_path / name)
        for name in ("run.jsonl", "RUN/export/answers.jsonl", "M/answers.jsonl")
    )
    assert run == adapter == merged and len(run) == 5
    assert [set(answer) for answer in run] == [{"id", "input", "output", "text", "tokens"}] * 5
    assert [answer["input"] for answer in run] == [str(i) for i in range(60, 65)]
    assert any(answer["tokens"] for answer in run)
    assert (tmp_path / "RUN" / "export" / "adapter_config.json").is_file(), "still the run's own"


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.slow
def test_a_run_on_conversations_is_asked_in_them_and_stops_at_its_end_of_turn(tokenizer, tmp_path):
    cases.llama(tmp_path / "base", tokenizer, initializer_range=0.05)
    (tmp_path / "chat.jinja").write_text(CHAT)
    turns = [("user", "Document 3"), ("assistant", "says that 4 follows")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "one.json").write_text(json.dumps(record, indent=1))
    out = ditty_di(
        tmp_path,
        *("+experiment=full", "run=RUN", "model.path=base", "data.path=one.json"),
        *("data.seq_len=64", "max_steps=40", "optimizer.lr=1e-2", "validator=none"),
        *("global_batch_size=1", "data.loader.micro_batch_size=1"),
        "tokenizer.chat_template=chat.jinja",
        "tokenizer.special_tokens=['<|user|>','<|assistant|>','<|end|>']",
    )
    assert "objective" in out
    asked = ["prompt=Document 3", "max_new_tokens=30"]
    for line in (["run=RUN", "task=generate"], ["task=generate_folder", "folder=RUN/export"]):
        assert ditty_di(tmp_path, *line, *asked, "output=a.jsonl").startswith("1 answer, ")
        (answer,) = answers(tmp_path / "a.jsonl")
        assert answer["text"] == "says that 4 follows" and answer["tokens"] < 30
        assert answer["input"] == "<|user|>Document 3<|end|><|assistant|>"
        assert answer["messages"] == record["messages"][:1]
    assert not (tmp_path / "outputs").exists()
