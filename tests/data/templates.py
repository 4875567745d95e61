"""Chat templates in small, each with what is special about a published one."""

from itertools import groupby

from transformers import AutoTokenizer

import ditty_di.assets

_PROMPTED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _PROMPTED
)
#: Marks the answer, but not the token that ends it.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}" + _PROMPTED
)
#: Marks it.
CLOSED = MARKED.replace(
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
#: SmolLM2: a system turn where there is none.
SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    + CHATML
)
#: Qwen3: no thoughts before the last user's turn; calls as objects, by `tojson`; tools.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    + _PROMPTED
)
#: GLM-4: turns are not closed, arguments are walked through.
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'observation' }}|>\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ '\n' ~ k }}={{ v }}{% endfor %}</tool_call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
#: DeepSeek-V3 and R1: the generation prompt opens a thought, arguments are joined as text.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<|call|>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}<|eos|>"
    "{% else %}<|output|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
#: Nemotron 3: as well, and an answer closes it.
NEMOTRON = CHATML.replace(
    "\n{{ m.content }}", "\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
).replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
#: gpt-oss: headers with channels, another end for the last answer.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final"
    "<|message|>{{ m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
#: Phi-3: EOS behind any conversation that is not prompted.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
#: Mistral: no generation prompt; EOS closes an answer; strict about the order of roles.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: LLaVA and others that see: contents are lists of parts only.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    + _PROMPTED
)

_NAMES = """
im_start im_end user assistant observation system User Assistant call output eos start channel
message return end start_header_id end_header_id eot_id
"""
_SPECIAL = ["[gMASK]", "<sop>", "<start_of_turn>", "<end_of_turn>"]
_SPECIAL += [f"<|{name}|>" for name in _NAMES.split()]


def chat_tokenizer(template, special=_SPECIAL):
    """The byte-level BPE of the base that ships, with the special tokens of all templates."""
    tokenizer = AutoTokenizer.from_pretrained(ditty_di.assets.base())
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    return tokenizer


def shown(example, tokenizer):
    """The text of an example, with what is learnt in ⟦brackets⟧."""
    text = ""
    runs = groupby(zip(example.ids, example.output, strict=True), key=lambda pair: pair[1])
    for learnt, pairs in runs:
        part = tokenizer.decode([token for token, _ in pairs])
        text += f"⟦{part}⟧" if learnt else part
    return text


def user(text, **more):
    return {"role": "user", "content": text, **more}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}
