"""Text out of a checkpoint, an export, or a model in memory; alone or in batches."""

import json

import pytest
import torch
from torch import nn

from ditty_di.export import HuggingFaceExport
from ditty_di.generation.decoding import Options, end_ids, hugging_face, plain
from ditty_di.generation.prompts import Prompts, read_prompts
from ditty_di.tasks.export import export
from ditty_di.tasks.generate import generate
from ditty_di.tasks.loading import ready

PROMPTS = ["Document 3 says", "D", "that 4 follows, and 2 does", "no"]
CPU = {"device": "cpu"}


@pytest.fixture
def model(build, checkpoint):
    model = build()
    ready(model, checkpoint, torch.device("cpu"))
    return model


def asked(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def answers(path):
    return [json.loads(line) for line in path.open()]


def test_prints_the_continuation_of_one_prompt(build, tokenizer, checkpoint, capsys):
    result = generate(build(), tokenizer, checkpoint, prompt="Document 3", max_new_tokens=9, **CPU)
    assert capsys.readouterr().out == "Document 3" + result["text"] + "\n"
    assert result["prompts"] == 1 and 0 < result["tokens"] <= 9


def test_checkpoint_export_and_transformers_agree(build, tokenizer, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tmp_path / "export")
    export(build(), HuggingFaceExport(tokenizer, folder), checkpoint)
    exported, words = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for prompt in PROMPTS:
        options = {"prompt": prompt, "max_new_tokens": 12, **CPU}
        from_run = generate(build(), tokenizer, checkpoint, **options)
        from_export = generate(exported, words, **options)
        assert (
            from_run["text"] == from_export["text"] and from_run["tokens"] == from_export["tokens"]
        )
        ids = words(prompt, return_tensors="pt")
        stock = exported.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        new = words.decode(stock[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert new == from_run["text"]


def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer, tmp_path):
    source = asked(tmp_path / "in.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
    outputs = []
    for batch_size in (1, 3, 8):
        outputs.append(tmp_path / f"out-{batch_size}.jsonl")
        result = generate(
            model,
            tokenizer,
            prompts=source,
            output=str(outputs[-1]),
            batch_size=batch_size,
            max_new_tokens=12,
            **CPU,
        )
    alone, *batched = (answers(output) for output in outputs)
    assert batched == [alone, alone]
    assert [(a["input"], a["id"]) for a in alone] == [(p, i) for i, p in enumerate(PROMPTS)]
    assert result["tokens"] == sum(a["tokens"] for a in alone)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", *(o.name for o in outputs)}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_both_decoders_agree_and_never_attend_to_padding(positions, model):
    if positions == "learned":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=60,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.5,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    for pad in (0, 1, 50):
        options = Options(max_new_tokens=10, pad_token_id=pad)
        assert hugging_face(model, prompts, options=options) == plain(
            model, prompts, options=options
        )


class Says(nn.Module):
    """A model without `generate` that goes through `tokens` one by one, from any of them."""

    def __init__(self, tokens, size):
        super().__init__()
        table = torch.zeros(size, size)
        table[tokens[:-1], tokens[1:]] = 1.0
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, ids):
        return self.table(ids)


def test_counts_tokens_without_eos_and_stops_there(tokenizer, tmp_path):
    ids = tokenizer("Document says that")["input_ids"]
    eos = tokenizer.eos_token_id
    says = Says([*ids, eos, ids[0]], len(tokenizer))
    start = tokenizer.decode(ids[:1])
    source = asked(tmp_path / "in.jsonl", [{"input": start}, {"prompt": "that"}])
    generate(
        says, tokenizer, prompts=source, output=str(tmp_path / "out"), max_new_tokens=30, **CPU
    )
    first, _ = answers(tmp_path / "out")
    assert first == {
        "id": 0,
        "input": start,
        "text": tokenizer.decode(ids[1:]),
        "tokens": len(ids) - 1,
    }


def test_pad_that_is_eos_changes_nothing(model, tokenizer):
    prompts = [[5, 6, 7], [8]]
    apart, same = (
        hugging_face(model, prompts, options=Options(12, pad_token_id=pad, eos_token_id=0))
        for pad in (1, 0)
    )
    assert apart == same


def test_end_tokens_of_the_model_count_beside_the_tokenizers(model):
    (row,) = hugging_face(model, [[5, 6]], options=Options(max_new_tokens=8))
    stop = row[4]
    model.generation_config.eos_token_id = [stop, 299]
    (cut,) = hugging_face(model, [[5, 6]], options=Options(max_new_tokens=8, eos_token_id=298))
    assert cut == row[: row.index(stop)]


def test_sampling_options(model):
    def sampled(seed, **options):
        torch.manual_seed(seed)
        return hugging_face(model, [[5, 6]], options=Options(12, temperature=1.5, **options))

    greedy = hugging_face(model, [[5, 6]], options=Options(max_new_tokens=12))
    # What a published model recommends must not leak into what was asked for.
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.1)
    assert hugging_face(model, [[5, 6]], options=Options(max_new_tokens=12)) == greedy
    assert sampled(0) == sampled(0) != sampled(1)
    assert sampled(0, top_k=1) == sampled(1, top_p=1e-6) == greedy
    torch.manual_seed(0)
    draws = [plain(model, [[5, 6]], options=Options(12, temperature=2.0)) for _ in range(2)]
    assert draws[0] != draws[1], "two batches must not get the same random numbers"


def test_a_long_prompt_keeps_its_end(model, tokenizer, tmp_path):
    long = " ".join(f"Document {i} says" for i in range(30))
    ids = tokenizer(long)["input_ids"]
    source = asked(tmp_path / "in.jsonl", [{"prompt": long}, {"prompt": "no"}])
    output = tmp_path / "out"
    generate(model, tokenizer, prompts=source, output=str(output), max_new_tokens=10, **CPU)
    first, second = answers(output)
    assert first["cut"] == len(ids) - (96 - 10) and "cut" not in second
    rest = hugging_face(model, [ids[first["cut"] :]], options=Options(10, eos_token_id=0))
    assert first["text"] == tokenizer.decode(rest[0], skip_special_tokens=True)


def test_bad_lines_are_named_with_their_number(tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"prompt": \n["x"]\n{"input": 3}\n{"text": "b"}\n"prompt"\n'
        '{"messages": [{"role": "user", "content": "c"}]}\n'
    )
    making = Prompts(tokenizer)
    with pytest.raises(ValueError) as error:
        read_prompts(str(path), making)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path} has lines that are not prompts:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        f"line {n}" for n in (3, 4, 5, 6, 7, 8)
    ]
    assert (
        "not JSON" in lines[1] and "not an object" in lines[2] and "needs a tokenizer" in lines[6]
    )
    assert 'it has no text as "prompt" or "input"' in lines[4]
    path.write_text('{"prompt": "x\u2028y", "id": "q"}\n\n{"input": "", "output": "z"}\n')
    found = read_prompts(str(path), making)
    assert [record for record, _ in found] == [
        {"input": "x\u2028y", "id": "q"},
        {"id": 1, "input": "", "output": "z"},
    ]
    assert found[0][1] == tokenizer("x\u2028y")["input_ids"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts; write lines such as"):
        read_prompts(str(path), making)


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_conversations_end_where_the_model_is_to_answer(model, tokenizer, tmp_path):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    turns = [{"role": "user", "content": "Document"}, {"role": "assistant", "content": "known"}]
    asking = [{"messages": turns}, {"messages": turns[:1]}, {"messages": turns[1:]}]
    source = asked(tmp_path / "in.jsonl", asking[:2])
    output = tmp_path / "out.jsonl"
    generate(model, chat, prompts=source, output=str(output), max_new_tokens=5, **CPU)
    first, second = answers(output)
    assert first["input"] == second["input"] == "user: Document\nassistant:"
    assert first["text"] == second["text"] and first["messages"] == turns
    with pytest.raises(ValueError, match="no turn that the assistant could answer"):
        Prompts(chat).ids(asking[2])
    with pytest.raises(ValueError, match="not a list of objects"):
        Prompts(chat).ids({"messages": "hi"})


@pytest.fixture
def chatty(tokenizer):
    """The tokenizer with a chat template whose end of turn is another token than EOS."""
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.add_tokens(["<|end|>"], special_tokens=True)
    chat.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return chat


def test_a_folder_with_a_chat_template_is_asked_by_it(model, chatty, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "ditty_di")
    wanted = "user: Document<|end|>\nassistant:"
    source = tmp_path / "in.jsonl"
    asked(
        source,
        [{"prompt": "Document", "mark": 1}, {"messages": [{"role": "user", "content": "D"}]}],
    )
    output = tmp_path / "out"
    model.resize_token_embeddings(len(chatty))
    options = {"max_new_tokens": 5, **CPU}
    generate(model, chatty, prompts=str(source), output=str(output), **options)
    first, second = answers(output)
    turns = [{"role": "user", "content": "Document"}]
    assert {k: first[k] for k in ("input", "messages", "mark")} == {
        "input": wanted,
        "messages": turns,
        "mark": 1,
    }
    assert second["input"] == "user: D<|end|>\nassistant:"
    assert "is sent as a turn of the user, by the chat template; chat=false" in caplog.text
    capsys.readouterr()
    text = generate(model, chatty, prompt="Document", **options)["text"]
    assert text == first["text"] and capsys.readouterr().out == text.strip() + "\n"
    caplog.clear()
    for untouched in ({"chat": False}, {"input_format": "__input__"}):
        generate(model, chatty, prompt="Document", **untouched, **options)
    assert capsys.readouterr().out.startswith("Document"), "a continuation"
    assert caplog.text == "", "nothing is said of what was typed"


def test_a_run_is_asked_as_it_was_trained(model, chatty, tmp_path, caplog):
    from ditty_di.data import Renderer

    caplog.set_level("INFO", "ditty_di")
    names = {"messages_key": "turns", "role_key": "from", "content_key": "value"}
    renderer = Renderer(chatty, **names, roles={"human": "user", "gpt": "assistant"})
    about = tmp_path / "data.json"
    model.resize_token_embeddings(len(chatty))
    source = asked(
        tmp_path / "in.jsonl",
        [
            {"prompt": "Hi"},
            {"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        ],
    )
    options = {"renderer": renderer, "about": str(about), "max_new_tokens": 4, **CPU}

    def inputs(**more):
        generate(model, chatty, prompts=source, output=str(tmp_path / "out"), **options, **more)
        return [answer["input"] for answer in answers(tmp_path / "out")]

    chat = "user: Hi<|end|>\nassistant:"
    assert inputs() == ["Hi", chat], "nothing is known"
    assert "without the chat template that the tokenizer has; chat=true" in caplog.text
    about.write_text('{"conversations": 0}')
    assert inputs() == ["Hi", chat]
    about.write_text('{"conversations": 3}')
    assert inputs() == [chat, chat] and inputs(chat=False) == ["Hi", chat]
    assert answers(tmp_path / "out")[1]["turns"][0] == {"from": "human", "value": "Hi"}
    with pytest.raises(ValueError, match=r'line 1: turn 0 of "turns" has no "from"'):
        asked(tmp_path / "in.jsonl", [{"turns": [{"role": "user", "content": "Hi"}]}])
        inputs()


def test_chat_needs_a_chat_template(model, tokenizer):
    with pytest.raises(ValueError, match="chat=true needs a tokenizer with a chat template"):
        generate(model, tokenizer, prompt="a", chat=True, **CPU)


@pytest.mark.parametrize("way", [hugging_face, plain])
def test_text_ends_with_the_turn_of_the_chat_template(build, checkpoint, chatty, way):
    model = build()
    ready(model, checkpoint, torch.device("cpu"))
    model.resize_token_embeddings(len(chatty))
    prompt = chatty("Document 3")["input_ids"]
    free = way(model, [prompt], options=Options(8))[0]
    end = chatty.convert_tokens_to_ids("<|end|>")
    assert end_ids(chatty) == sorted({chatty.eos_token_id, end})
    assert (
        way(model, [prompt], options=Options(8, eos_token_id=[free[3], end]))[0]
        == (free[: free.index(free[3])])
    )


@pytest.mark.parametrize(("given", "text"), [(2024, "2024"), (0.5, "0.5"), (True, "true")])
def test_a_number_typed_as_prompt_is_its_text(model, tokenizer, given, text):
    found = generate(model, tokenizer, prompt=given, max_new_tokens=3, **CPU)
    assert found["text"] == generate(model, tokenizer, prompt=text, max_new_tokens=3, **CPU)["text"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a b"}\n{"prompt": "{x} [c]"}\n'),
        ("p.json", '[\n {"prompt": "a b"},\n {"input": "{x} [c]"}\n]'),
        ("prompts", '{"prompt": "a b"}\n{"prompt": "{x} [c]"}\n'),
        ("p.txt", "a b\n\n{x} [c]\r\n"),
        ("prompts", "a b\n{x} [c]"),
        ("p.csv", "prompt\na b\n{x} [c]\n"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_prompts_in_files_of_every_kind(tokenizer, tmp_path, name, content, compressed):
    import gzip

    file = tmp_path / (f"{name}.gz" if compressed else name)
    file.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    found = read_prompts(str(file), Prompts(tokenizer))
    assert [record["input"] for record, _ in found] == ["a b", "{x} [c]"]


def test_a_prompt_beyond_the_models_positions_loses_its_beginning_and_it_is_said(
    tokenizer, tmp_path, caplog
):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    ids = tokenizer(" ".join(f"Document {i} says" for i in range(12)))["input_ids"]
    assert 24 < len(ids) < tokenizer.model_max_length
    source = asked(tmp_path / "in.jsonl", [{"prompt": tokenizer.decode(ids)}, {"prompt": "no"}])
    generate(
        model, tokenizer, prompts=source, output=str(tmp_path / "out"), max_new_tokens=8, **CPU
    )
    first, second = answers(tmp_path / "out")
    assert first["cut"] == len(ids) - 16 and "cut" not in second
    assert "1 of 2 prompts are longer than 16 tokens and lose their beginning" in caplog.text
    with pytest.raises(ValueError, match=r"max_new_tokens=24 leaves .* the model has 24 positions"):
        generate(model, tokenizer, prompt="no", max_new_tokens=24, **CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None, "prompts": None}, "^prompt: give either prompt"),
        ({"prompt": "a", "prompts": "b"}, "^prompt: give either prompt"),
        ({"prompts": "/no/such.jsonl"}, "^prompts=/no/such.jsonl: no such file"),
        ({"max_new_tokens": 0}, "^max_new_tokens=0 must"),
        ({"batch_size": 0}, "^batch_size=0 must"),
    ],
)
def test_it_is_refused_before_a_model_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        generate.validate(**options)
    generate.validate(prompts=None)  # a prompt that is not known yet
    generate.validate()


def test_an_input_format_and_the_encoder_of_training_make_the_prompt(model, tokenizer, tmp_path):
    from ditty_di.data import Renderer

    pattern = "Document __input__ says __what__:"
    record = {"input": "3", "what": "that", "output": "4"}
    wanted = tokenizer("Document 3 says that:")["input_ids"]
    assert Prompts(tokenizer, input_format=pattern).ids(record) == wanted
    renderer = Renderer(tokenizer, input_format=pattern, output_format="__output__")
    assert Prompts(tokenizer, renderer=renderer).ids(record) == wanted
    ((trained,),) = renderer([record])
    assert trained.ids[: len(wanted)] == wanted, "what stood before the output in training"
    source, output = asked(tmp_path / "in.jsonl", [record]), tmp_path / "out.jsonl"
    options = {"max_new_tokens": 4, **CPU}
    generate(model, tokenizer, prompts=source, output=str(output), renderer=renderer, **options)
    (answer,) = answers(output)
    plainly = generate(model, tokenizer, prompt="Document 3 says that:", **options)
    assert answer == record | {"id": 0, "text": plainly["text"], "tokens": plainly["tokens"]}
    with pytest.raises(ValueError, match=r'prompt alone is not enough here: no key "what"'):
        generate(model, tokenizer, prompt="3", renderer=renderer, **options)


def test_an_answer_is_printed_alone_a_continuation_with_its_start(model, tokenizer, capsys):
    text = generate(model, tokenizer, prompt="3", input_format="Document __input__", **CPU)["text"]
    assert capsys.readouterr().out == text.strip() + "\n"


def test_encoder_decoder_models(tokenizer, tmp_path):
    from ditty_di.export.load import published
    from tests.export import cases

    model = published(cases.t5(tmp_path / "base", tokenizer)).eval()
    model.generation_config.eos_token_id = None
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = [[5, 6, 7, 8, eos], [9, eos]]
    options = Options(max_new_tokens=6, pad_token_id=pad)
    batched = hugging_face(model, prompts, options=options)
    assert batched == [hugging_face(model, [p], options=options)[0] for p in prompts]
    said = [pad]
    for _ in range(6):
        logits = model(
            input_ids=torch.tensor(prompts[:1]), decoder_input_ids=torch.tensor([said])
        ).logits[0, -1]
        seen = torch.tensor(said).unique()  # the model's own repetition_penalty, 1.25
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / 1.25, scores * 1.25)
        said.append(int(logits.argmax()))
    assert batched[0] == said[1:]
    asking = asked(tmp_path / "in.jsonl", [{"input": PROMPTS[0]}])
    generate(model, tokenizer, prompts=asking, output=str(tmp_path / "out"), **CPU)
    assert answers(tmp_path / "out")[0]["input"] == PROMPTS[0]


def test_penalty_and_beams(model):
    def greedy(**options):
        return hugging_face(model, [[5, 6]], options=Options(max_new_tokens=24, **options))[0]

    assert len(set(greedy(repetition_penalty=1e6))) == 24
    assert greedy(repetition_penalty=1.0) == greedy() == greedy(num_beams=1)
    assert greedy(num_beams=4) != greedy()
    with pytest.raises(ValueError, match="need a model with transformers' generate"):
        plain(model, [[5, 6]], options=Options(num_beams=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either prompt"),
        ({"prompt": "a", "prompts": "b"}, "give either prompt"),
        ({"prompt": "a", "max_new_tokens": 96}, "leaves no room for a prompt: the tokenizer's"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"prompt": "a", "temperature": -1}, "0 is greedy"),
        ({"prompt": "a", "top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"prompt": "a", "top_k": 0}, "top_k=0 must be at least 1, or null"),
        ({"prompt": "a", "repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"prompt": "a", "num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"prompt": "a", "batch_size": 0}, "batch_size=0"),
        ({"prompt": "a"}, "the model is on the meta device"),
    ],
)
def test_what_cannot_be_done_is_said(options, message, build, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(build(), tokenizer, **options, **CPU)


def test_an_empty_prompt_of_a_model_trained_on_records_is_refused():
    from ditty_di.data import Renderer
    from tests.data.words import word_tokenizer

    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="the prompt has no token; write a word"):
        Prompts(tokenizer, renderer=Renderer(tokenizer)).ids({"input": ""})


def test_weights_that_leave_something_unset_are_refused(build, tokenizer, checkpoint):
    from functools import partial

    from ditty_di.checkpoint.read import from_checkpoint

    bare, model = partial(from_checkpoint, path=checkpoint.keywords["path"]), build()
    model.default_weights = None
    with pytest.raises(ValueError, match=r"no value: .*inv_freq.*`initialize`"):
        generate(model, tokenizer, bare, prompt="a", **CPU)


def test_an_answer_file_is_whole_or_not_there(model, tokenizer, tmp_path):
    source = asked(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier time")
    calls = []

    def decode(model, prompts, /, *, options):
        calls.append(prompts)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return [[5]]

    options = {"prompts": source, "output": str(output), "batch_size": 1, **CPU}
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, decode=decode, **options)
    assert output.read_text() == "of an earlier time"


def test_only_the_first_of_several_ranks_works(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert generate(model, tokenizer, prompt="a", **CPU) == {}
    assert capsys.readouterr().out == ""
