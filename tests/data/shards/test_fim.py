from itertools import pairwise

import numpy as np
import pytest
import torch

from ditty_di.data import FillInTheMiddle, Loader, Shards, train_bpe
from ditty_di.models.tokenizer import add_to
from tests.data.shards.test_shards import write_folder

TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


@pytest.fixture(scope="module")
def tokenizer(cache_dir):
    return add_to(train_bpe(["one two three"], 300, cache_dir=cache_dir), TOKENS, None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    draw = np.random.default_rng(0)
    documents = [[*draw.integers(10, 250, 40), 0] for _ in range(300)]
    return Shards(write_folder(tmp_path_factory.mktemp("fim"), documents, vocab_size=1000), 82)


def test_documents_are_rearranged_at_the_rates_and_keep_their_tokens(shards, tokenizer):
    prefix, _, suffix = tokenizer.convert_tokens_to_ids(list(TOKENS))
    data = FillInTheMiddle(shards, 0.5, 0.25, tokens=TOKENS, tokenizer=tokenizer)
    np.random.seed(0)
    rearranged = spm = documents = 0
    for index in range(len(data)):
        inputs, labels = data[index]
        ids = inputs["input"].tolist()
        assert len(ids) == len(labels) == 82
        rearranged += ids.count(prefix)
        spm += sum(pair == (prefix, suffix) for pair in pairwise(ids))
        documents += int((inputs["position_ids"] == 0).sum())
        assert prefix in ids or ids == shards[index][0]["input"].tolist()
    assert 0.4 < rearranged / documents < 0.6 and 0.15 < spm / rearranged < 0.35
    assert inputs.keys() == {"input", "position_ids"}


def test_both_forms_token_by_token(tmp_path, tokenizer):
    prefix, middle, suffix = tokenizer.convert_tokens_to_ids(list(TOKENS))
    document = [11, 12, 13, 14, 15, 0]
    shards = Shards(write_folder(tmp_path, [document, [20, 21, 0]], vocab_size=1000), 14)
    for spm in (0.0, 1.0):
        data = FillInTheMiddle(shards, 1.0, spm, tokens=TOKENS, tokenizer=tokenizer)
        for seed in range(20):
            np.random.seed(seed)
            inputs, labels = data[0]
            ids = inputs["input"].tolist()
            first = ids[: ids.index(0)]
            s, m = first.index(suffix), first.index(middle)
            after = first[s + 1 : m]
            if spm:
                assert first[:2] == [prefix, suffix]
                assert [*first[m + 1 :], *after] == document[:-1]
            else:
                assert [*first[1:s], *first[m + 1 :], *after] == document[:-1]
            assert inputs["position_ids"].tolist() == [*range(9), *range(5)]
            assert labels[8] == -100 and labels[7] == 0


def test_the_draws_follow_the_position_whatever_the_workers(shards, tokenizer):
    data = FillInTheMiddle(shards, 0.5, 0.5, tokens=TOKENS, tokenizer=tokenizer)

    def read(ranks=1, batch=8, start=None, count=4, **options):
        loaders = [
            Loader(data, batch, seed=1, dp_rank=r, dp_world_size=ranks, **options)
            for r in range(ranks)
        ]
        for loader in loaders if start else ():
            loader.load_state_dict(start)
        batches = zip(*map(iter, loaders), strict=True)
        found = [
            row
            for _, some in zip(range(count), batches, strict=False)
            for x, _ in some
            for row in x["input"]
        ]
        return torch.stack(found), loaders[0].state_dict()

    whole, _ = read(count=8)
    assert torch.equal(read(count=8, num_workers=2)[0], whole)
    head, state = read(count=4)
    tail, _ = read(ranks=2, batch=2, start=state, count=8)
    assert torch.equal(torch.cat([head, tail]), whole)


def test_what_is_refused(shards, tokenizer, cache_dir, tmp_path):
    with pytest.raises(ValueError, match=r"rate=1\.5 must be from 0 to 1"):
        FillInTheMiddle(shards, 1.5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"spm_rate=-1 must be"):
        FillInTheMiddle(shards, 1, -1, tokenizer=tokenizer)
    plain = train_bpe(["one two three"], 300, cache_dir=cache_dir)
    with pytest.raises(ValueError, match=r"lacks <\|fim_prefix\|>, <\|fim_middle\|>, <\|fim_suff"):
        FillInTheMiddle(shards, tokenizer=plain)
    overlapping = Shards(write_folder(tmp_path, [[1, 2, 3, 4]]), 2, overlap=1)
    with pytest.raises(ValueError, match="overlap=0"):
        FillInTheMiddle(overlapping, tokenizer=tokenizer)
