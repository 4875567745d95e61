from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import (
    BertPreTokenizer,
    ByteLevel,
    Digits,
    Metaspace,
    Sequence,
    Split,
    Whitespace,
)

from ditty_di.data.tokenization.words import WordEncoder

EOS = "<|end|>"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "It isn't the end of the story: call(self.value, *args) of the 1,234.5 lists.\n\n"
    'def f(x_1):\n    return "a  b"  # The END of the  table <td>É ★</td>\n\tok\r\n'
) * 4


def split(pattern):
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)])


def unigram(tokenizer):
    return trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")


def bpe(tokenizer):
    alphabet = ByteLevel.alphabet() if "ByteLevel" in repr(tokenizer.pre_tokenizer) else []
    return trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, show_progress=False, special_tokens=["<unk>"]
    )


def wordpiece(tokenizer):
    return trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"])


def made(model, trainer, pre_tokenizer=None, normalizer=None, also=(), corpus=(TEXT,)):
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(corpus, trainer(tokenizer))
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    for token in also:
        tokenizer.add_tokens([token])
    return tokenizer


def byte_level(pre_tokenizer=None, **options):
    return made(models.BPE(), bpe, pre_tokenizer or ByteLevel(False), **options)


#: Tokenizers, and how many words they may cut a line of the text into: 1 where none.
LINE = "call(self.value, of)  the\n    end"
TOKENIZERS = {
    "gpt-2": (byte_level, 9),
    "prefix space": (lambda: byte_level(ByteLevel(True)), 4),
    "llama 3": (lambda: byte_level(split(LLAMA_3)), 9),
    "qwen": (lambda: byte_level(split(LLAMA_3), normalizer=normalizers.NFC()), 9),
    "deepseek": (
        lambda: byte_level(
            Sequence([Split(Regex(r"\p{N}{1,3}"), "isolated"), *split(DEEPSEEK_V3)])
        ),
        9,
    ),
    "across words": (lambda: byte_level(ByteLevel(False, use_regex=False)), 1),
    "phrases": (lambda: byte_level(split(r" ?of the|\S+|\s+")), 1),
    "digits": (lambda: byte_level(Sequence([Digits(True), ByteLevel(False)])), 9),
    "blank tokens": (
        lambda: byte_level(also=[AddedToken(" " * n, normalized=True) for n in (2, 3, 4)]),
        7,
    ),
    "blank around a token": (
        lambda: byte_level(also=[AddedToken("<td>", lstrip=True), AddedToken("END", rstrip=True)]),
        9,
    ),
    "a token with a space": (lambda: byte_level(also=[AddedToken("of the", normalized=False)]), 9),
    "a lower-case token": (
        lambda: byte_level(also=[AddedToken("of the")], normalizer=normalizers.Lowercase()),
        1,
    ),
    "llama 2": (
        lambda: made(
            models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
            bpe,
            normalizer=normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            ),
        ),
        1,
    ),
    "gemma": (
        lambda: made(
            models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
            bpe,
            Split(" ", "merged_with_previous"),
            normalizers.Replace(" ", "▁"),
            corpus=["It", "is", "a", "word", *map(chr, range(33, 127))],
        ),
        1,
    ),
    "bert": (
        lambda: made(
            models.WordPiece(unk_token="[UNK]"),
            wordpiece,
            BertPreTokenizer(),
            normalizers.BertNormalizer(),
        ),
        9,
    ),
    "t5": (
        lambda: made(
            models.Unigram(),
            unigram,
            Metaspace("▁", "always"),
            normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        ),
        2,
    ),
    "whitespace": (lambda: made(models.BPE(unk_token="<unk>"), bpe, Whitespace()), 4),
    "dropout": (lambda: byte_level(), 1),
}


@cache
def encoder(name):
    tokenizer = TOKENIZERS[name][0]()
    if name == "dropout":
        tokenizer.model.dropout = 0.5
    return WordEncoder(tokenizer, tokenizer.token_to_id(EOS))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_are_cut_where_the_tokenizer_allows_it(name):
    cut = encoder(name).cut
    assert (len(cut.split(LINE)) if cut else 1) == TOKENIZERS[name][1]


TEXTS = st.lists(
    st.sampled_from(
        [
            *("aZ1 .'\n\t(_<é\u0301★½中  "),
            *("  ", "of the", "OF THE", "<td>", "END", EOS, "<|e", "nd|>", "isn't", "1234"),
            *("call(self", "<unk>", "\u00a0", "\r\n", "\x85", "{}"),
        ]
    ),
    max_size=25,
).map("".join)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "dropout"])
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
@example(texts=[TEXT, LINE, "", " ", "a <td>  b", "END  of", "x of  the"])
def test_the_ids_are_those_of_each_text_alone(name, texts):
    encode = encoder(name)
    wanted = [e.ids for e in encode.tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert encode(texts) == wanted
    assert encode(texts[::-1]) == wanted[::-1]
