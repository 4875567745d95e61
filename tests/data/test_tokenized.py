import json
import logging
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from ditty_di.data import (
    PackedDataset,
    Renderer,
    TokenDataset,
    TokenizedDataset,
    TokenizedSeq2SeqDataset,
    in_memory,
    label_tokens,
    prompts,
    records,
)
from tests.data.words import CHAT, word_tokenizer

RECORDS = [
    {"input": "a b", "output": "c"},
    {"input": "a", "output": ""},
    {"input": "a b c d", "output": "e f g"},
]


def examples(cache_dir, found=RECORDS, tokenizer=None, loss_mask="output_only", **options):
    renderer = Renderer(tokenizer or word_tokenizer(), **options)
    return TokenizedDataset(in_memory(found), renderer, loss_mask=loss_mask, cache_dir=cache_dir)


def texts(dataset, index, tokenizer):
    """The row's input and its labels, "." where nothing is learnt."""
    row, labels = dataset[index]
    assert row["input"].dtype == labels.dtype == torch.int64
    learnt = [tokenizer.convert_ids_to_tokens(i) if i >= 0 else "." for i in labels.tolist()]
    return "".join(tokenizer.convert_ids_to_tokens(row["input"].tolist())), "".join(learnt)


def test_labels_are_the_next_tokens_where_they_are_learnt(tmp_path):
    tokenizer = word_tokenizer()
    dataset = examples(tmp_path, tokenizer=tokenizer)
    assert texts(dataset, 0, tokenizer) == ("a bc", "..c<eos>")
    assert texts(dataset, 1, tokenizer) == ("a", "<eos>"), "an empty output teaches to stop"
    assert texts(dataset, -1, tokenizer) == ("a b c de f g", "......e f g<eos>")
    assert dataset.lengths.tolist() == [4, 1, 12] == [len(labels) for _, labels in dataset]
    with pytest.raises(IndexError):
        dataset[3]


def test_no_mask_learns_every_token(tmp_path):
    tokenizer = word_tokenizer(bos=True)
    dataset = examples(tmp_path, tokenizer=tokenizer, loss_mask="no_mask")
    assert texts(dataset, 0, tokenizer) == ("<bos>a bc", "a bc<eos>")
    with pytest.raises(ValueError, match="loss_mask='input' must be one of output_only, no_mask"):
        examples(tmp_path, loss_mask="input")


def test_eos_is_learnt_where_it_is_also_the_padding(tmp_path):
    tokenizer = word_tokenizer(pad_token="<eos>")
    assert texts(examples(tmp_path, tokenizer=tokenizer), 0, tokenizer) == ("a bc", "..c<eos>")


def test_examples_without_a_token_to_learn_are_dropped_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        dataset = examples(tmp_path, max_tokens=5)
        assert len(dataset) == 2
        examples(tmp_path, max_tokens=5)
    told = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    (work, line, again) = told
    assert work == "tokenizing records ...", "once: the second time they come from the cache"
    assert "2 examples of 3 records: 7 tokens, the longest 5" in line
    assert "0 cut to fit, 1 dropped without a token to learn" in line
    assert line == again, "also when it comes from the cache"
    # A lone first token has nothing before it to predict it from.
    with pytest.raises(ValueError, match="no example is left of 1 record: 1 without a token"):
        examples(tmp_path, [{"input": "", "output": ""}])


def test_all_bad_lines_are_told_at_once(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = ['{"input": "a", "output": "b"}', "{", '{"input": "a"}', *["[]"] * 10]
    path.write_text("\n".join(lines))
    source = records(path, validation_fraction=0)
    with pytest.raises(ValueError, match="12 of 13 records cannot be used; the first 10") as error:
        TokenizedDataset(source, Renderer(word_tokenizer()), cache_dir=tmp_path)
    told = str(error.value).splitlines()[1:]
    assert len(told) == 10
    assert told[0].startswith(f"{path}:2: not JSON")
    assert told[1] == f"""{path}:3: no key "output" among ['input']"""
    assert not list((tmp_path / "tokenized").glob("[!.]*[!k]")), "nothing is cached"


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"question": "a", "answer": "b"}, "__question__ data.output_format=__answer__"),
        ({"instruction": "a", "output": "b", "input": ""}, "data=alpaca data.path=..."),
        ({"instruction": "a", "response": "b", "context": ""}, "data=dolly data.path=..."),
        ({"conversations": [{"from": "human", "value": "a"}]}, "data=slim_orca data.path=..."),
        ({"text": "a"}, "data=text data.corpus.path=..."),
        ({"text": "a", "label": "b"}, None),
        ({"input": "a", "colour": "b"}, None),
    ],
)
def test_records_of_a_known_shape_are_told_what_to_type(tmp_path, record, remedy):
    renderer = Renderer(word_tokenizer(), input_format="__input__ __missing__")
    for source in (in_memory([record] * 3), in_memory([record | {"id": 1}])):
        with pytest.raises(ValueError) as error:
            TokenizedDataset(source, renderer, cache_dir=tmp_path)
        last = str(error.value).splitlines()[-1]
        if remedy:
            assert last.startswith("for records with") and remedy in last
        elif "label" in record:
            assert last.endswith("data=text data.corpus.path=..., for text without an output")
        else:
            assert "no key" in last


def test_mixed_records_get_no_remedy(tmp_path):
    source = in_memory([{"question": "a", "answer": "b"}, {"colour": "red"}, ValueError("x")])
    with pytest.raises(ValueError, match="3 of 3 records") as error:
        TokenizedDataset(source, Renderer(word_tokenizer()), cache_dir=tmp_path)
    assert "for records with" not in str(error.value)


def rehearsed(source, tokenizer=None, loss_mask="output_only", **options):
    renderer = Renderer(tokenizer or word_tokenizer(), **options)
    arguments = {"records": source, "renderer": renderer, "loss_mask": loss_mask}
    return TokenizedDataset.rehearse(arguments.__getitem__)


def test_the_first_records_are_looked_at_before_a_run(tmp_path):
    assert rehearsed(in_memory(RECORDS), output_format=" __output__") == []
    with pytest.raises(ValueError, match="2 of 5 records cannot be used") as error:
        rehearsed(in_memory([*RECORDS, {"input": "a"}, {"output": "a"}]))
    assert "example 3: no key" in str(error.value)
    with pytest.raises(ValueError, match="100 of the first 100 records"):
        rehearsed(in_memory([{"input": "a"}] * 200))
    endless = in_memory([RECORDS[0]] * 100 + [{"colour": "red"}])
    assert rehearsed(endless, output_format=" __output__") == [], "the hundred first"
    with pytest.raises(ValueError, match="no example is left of 2 records: 2 without"):
        rehearsed(in_memory(RECORDS[::2]), max_tokens=1)
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no records in .*train.jsonl: write one JSON object"):
        rehearsed(records(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match=r"nothing can be held out of .*one.jsonl: it has no two"):
        (tmp_path / "one.jsonl").write_text(json.dumps(RECORDS[0]))
        rehearsed(records(tmp_path / "one.jsonl", "validation"))


def test_an_only_record_is_an_example_and_counted_in_the_singular(tmp_path, caplog):
    (tmp_path / "one.jsonl").write_text(json.dumps(RECORDS[0]))
    with caplog.at_level(logging.INFO):
        found = TokenizedDataset(
            records(tmp_path / "one.jsonl"), Renderer(word_tokenizer()), cache_dir=tmp_path
        )
    assert len(found) == 1 and "1 example of 1 record: 4 tokens" not in caplog.text
    assert "1 example of 1 record: 5 tokens" in caplog.text


def test_tokenized_once_by_content_tokenizer_and_options(tmp_path, monkeypatch):
    first = examples(tmp_path)
    monkeypatch.setattr(Renderer, "__call__", None)  # tokenizing again would fail
    again = examples(tmp_path)
    assert isinstance(again._tokens, np.memmap) and not again._tokens.flags.writeable
    assert torch.equal(first[2][1], again[2][1])
    monkeypatch.undo()
    for other in (
        {"tokenizer": word_tokenizer(bos=True)},
        {"loss_mask": "no_mask"},
        {"max_tokens": 9},
        {"found": RECORDS[:2]},
    ):
        examples(tmp_path, **other)
    assert len([p for p in (tmp_path / "tokenized").iterdir() if p.is_dir()]) == 5


def _prepare(folder, cache_dir, queue):
    found = TokenizedDataset(records(folder), Renderer(word_tokenizer()), cache_dir=cache_dir)
    queue.put(found._tokens.tolist())


def test_processes_without_a_group_wait_for_the_first(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS * 200)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (tmp_path, tmp_path / "cache", queue)
    workers = [context.Process(target=_prepare, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2] and len(found[0]) > 100


def test_workers_that_are_not_forked_map_the_files_again(tmp_path):
    dataset = examples(tmp_path, RECORDS * 2000)
    packed = pickle.dumps(dataset)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[2][1], dataset[2][1])


def test_a_large_vocabulary_gets_wider_ids(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)])
    dataset = examples(tmp_path, [{"input": "a", "output": "<65535>"}], tokenizer)
    assert dataset[0][1].tolist() == [len(tokenizer) - 1, tokenizer.eos_token_id]


def test_for_an_encoder_and_a_decoder(tmp_path):
    tokenizer = word_tokenizer(eos_after=True)
    dataset = TokenizedSeq2SeqDataset(examples(tmp_path, tokenizer=tokenizer, end_input=True))
    assert texts(dataset, 0, tokenizer) == ("a b<eos>", "c<eos>")
    assert dataset.lengths.tolist() == [6, 3, 14] and len(dataset) == 3
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = examples(tmp_path, [{"messages": turns}], word_tokenizer(chat_template=CHAT))
    with pytest.raises(ValueError, match="example 0 is a conversation"):
        TokenizedSeq2SeqDataset(chat)[0]


def test_labels_alone_and_prompts(tmp_path):
    tokenizer = word_tokenizer(bos=True)
    dataset = examples(tmp_path, tokenizer=tokenizer, input_format="__input__:")
    assert tokenizer.decode(label_tokens(dataset)) == "c<eos><eos>e f g<eos>"
    everything = examples(tmp_path, tokenizer=tokenizer, loss_mask="no_mask")
    assert len(label_tokens(everything)) == everything.lengths.sum()
    assert prompts(dataset, 2) == ["a b:", "a:"]
    assert prompts(PackedDataset(dataset, 16), 9) == prompts(TokenizedSeq2SeqDataset(dataset), 9)
    assert len(prompts(dataset, 9)) == 3
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    mixed = [*RECORDS, {"messages": turns}]
    assert examples(tmp_path, mixed, word_tokenizer(chat_template=CHAT)).conversations == 1
    assert dataset.conversations == 0


def test_any_rows_of_token_ids_have_prompts():
    tokenizer = word_tokenizer()
    tokens = np.array(tokenizer("a b c d e f g a b c d e f g")["input_ids"] * 3)
    rows = TokenDataset(tokens, seq_len=20)
    assert prompts(rows, 2, tokenizer=tokenizer) == [
        tokenizer.decode(tokens[start : start + 16]) for start in (0, 20)
    ]
    answered = [({"input": torch.tensor(tokens[:6])}, torch.tensor([-100, -100, 3, 4, 5, 6]))]
    assert prompts(answered, tokenizer=tokenizer) == [tokenizer.decode(tokens[:3])]
    with pytest.raises(ValueError, match="rows of a TokenDataset need a `tokenizer`"):
        prompts(rows)
    with pytest.raises(ValueError, match=r"row 0 of the list has no token ids.*sample_text=null"):
        prompts([(torch.zeros(3), 1.0)], tokenizer=tokenizer)


def test_findings_are_told_once_a_kind_with_the_first_record_and_from_the_cache_too(
    tmp_path, caplog
):
    path = tmp_path / "train.jsonl"
    lines = [RECORDS[0], *[{**RECORDS[0], "images": ["x"], "id": i} for i in range(3)]]
    path.write_text("\n".join(map(json.dumps, lines)))

    def told(**options):
        caplog.clear()
        TokenizedDataset(
            records(path, validation_fraction=0),
            Renderer(word_tokenizer(), output_format=" __output__", **options),
            cache_dir=tmp_path / "cache",
        )
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    (line,) = told()
    assert line.startswith('nothing reads "id", "images": name them in data.input_format')
    assert line.endswith(f"(3 examples, the first: {path}:2)")
    assert told() == [line], "from the cache"
    assert not told(ignored_fields=["id", "images"])
    with pytest.raises(ValueError, match="3 of 4 records cannot be used") as error:
        told(audit="refuse")
    assert f'{path}:2: nothing reads "id", "images"' in str(error.value)


def test_what_a_template_raises_is_told_by_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "user", "content": "a", "n": 1}, *good["messages"][1:]]}
    path.write_text("\n".join(map(json.dumps, [good, bad])))
    raising = "{% if messages[0].n %}{{ 'a' + messages[0].n }}{% endif %}" + CHAT
    renderer = Renderer(word_tokenizer(chat_template=raising))
    with pytest.raises(ValueError, match=rf"(?s)1 of 2.*{path.name}:2: the chat .*TypeError"):
        TokenizedDataset(
            records(path, validation_fraction=0), renderer, cache_dir=tmp_path / "cache"
        )
