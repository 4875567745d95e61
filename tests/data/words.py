"""A tokenizer whose tokens are words, so that tests can say what they expect."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<bot>", "<end>"]
CHAT = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
#: What earlier turns look like depends on whether later ones follow, as with Qwen3's thoughts.
UNSTABLE = CHAT.replace(
    "{{ m.content }}", "{{ '!' if loop.last and m.role != 'user' }}{{ m.content }}"
)
MASKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{% generation %}{{ m.content }}"
    "{% endgeneration %}<end>{% else %}<user>{{ m.content }}<end>{% endif %}{% endfor %}"
)


def word_tokenizer(bos=False, eos_after=False, chat_template=None, **arguments):
    """Words, spaces and single characters of punctuation are tokens; letters a-h are words."""
    words = [*SPECIAL, " ", "\n", *"abcdefgh!?:", "question", "answer", "positive", "negative"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    pieces = [pre_tokenizers.Split(Regex(r"\s|[!?:]"), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.Fuse()
    if bos or eos_after:
        single = ["<bos>"] * bos + ["$A"] + ["<eos>"] * eos_after
        ids = [("<bos>", 1), ("<eos>", 2)]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(single), special_tokens=ids
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **arguments},
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<bot>", "<end>"],
        chat_template=chat_template,
    )
