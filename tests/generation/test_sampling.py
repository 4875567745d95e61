"""Sampling with `forward` alone."""

import pytest
import torch

from ditty_di.generation.sampling import choose, continuations, prompt_ids

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaForCausalLM

    from tests.models.tiny import llama

    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64}
    config = llama(
        **size, num_attention_heads=2, max_position_embeddings=2048, initializer_range=0.5
    )
    return LlamaForCausalLM(config).eval()


def run(llama, prompts, **options):
    shapes = []

    def forward(inputs):
        shapes.append(tuple(inputs["input"].shape))
        return llama(inputs["input"], use_cache=False)

    rows = continuations(forward, prompts, **{"device": DEVICE, "max_new_tokens": 6} | options)
    return rows, shapes


def test_greedy_equals_transformers_row_by_row(llama):
    prompts = [[1, 2, 3, 4, 5], [7], [9, 10]]
    rows, shapes = run(llama, prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        full = llama.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)
        assert row == full[0, len(prompt) :].tolist()
    assert set(shapes) == {(3, 11)}, "one shape, so that compiling happens once"


def test_a_seed_gives_one_text_and_another_seed_another(llama):
    once, again, other = (
        run(llama, [[1, 2]], temperature=1.5, max_new_tokens=12, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert once == again != other


def test_the_model_never_sees_more_than_its_maximum_length(llama):
    rows, shapes = run(llama, [[1, 2, 3], [4]], max_length=5, max_new_tokens=9)
    assert set(shapes) == {(2, 5)} and [len(r) for r in rows] == [9, 9]
    window = ([4] + rows[1])[-6:-1]
    assert rows[1][-1] == llama(torch.tensor([window])).logits[0, -1].argmax()


def test_text_ends_at_eos(llama):
    (row,), _ = run(llama, [[1, 2, 3]])
    (cut,), _ = run(llama, [[1, 2, 3]], eos_token_id=row[2])
    assert cut == row[: row.index(row[2])]


def test_choosing():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature, top_k=None, top_p=None):
        chosen = choose(logits, temperature, top_k, top_p, generator)
        return chosen.bincount(minlength=4) / 4000

    assert frequencies(0.0).tolist() == [0, 1, 0, 0]
    close = {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(frequencies(2.0), (logits[0] / 2).softmax(-1), **close)
    two = logits[0, 1:3].softmax(-1)
    torch.testing.assert_close(frequencies(1.0, top_k=2)[1:3], two, **close)
    # 0.64 + 0.24 reach 0.7 with two tokens; one token reaches 0.6.
    torch.testing.assert_close(frequencies(1.0, top_p=0.7)[1:3], two, **close)
    assert frequencies(1.0, top_p=0.6).tolist() == [0, 1, 0, 0]
    assert frequencies(1.0, top_k=99).min() > 0


class Letters:
    eos_token_id, bos_token_id, model_max_length = 0, None, int(1e30)

    def __call__(self, text):
        return {"input_ids": [ord(c) - 96 for c in text] + [0] * (self.eos_token_id == 0)}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i + 96) for i in ids)


def test_prompts_lose_their_eos_but_are_never_empty():
    letters = Letters()
    assert prompt_ids(letters, "ab") == [1, 2]
    assert prompt_ids(letters, "") == [0], "EOS separates documents, so it starts one too"
    letters.bos_token_id = 9
    assert prompt_ids(letters, "") == [9]
    letters.bos_token_id = letters.eos_token_id = None
    with pytest.raises(ValueError, match="an empty prompt needs a tokenizer with a BOS or EOS"):
        prompt_ids(letters, "")
