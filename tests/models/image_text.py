"""Tiny vision-language models and their processors, saved as Hugging Face saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from ditty_di.models.processor import VideoSettings, videos_unread

WORDS = [
    *("user", "assistant", ":", ".", "which", "digit", "is", "this", "a", "b", "c", "red", "blue"),
    *("one", "two", "three", "four", "five"),
]
SPECIAL = [
    *("<pad>", "<eos>", "<unk>", "<end>"),
    *("<image>", "<fake_token_around_image>", "<global-img>", "<video>"),
    *("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
]
TEMPLATE = (
    "{%% for m in messages %%}{{ m.role }} : {%% if m.content is string %%}{{ m.content }}"
    "{%% else %%}{%% for p in m.content %%}{%% if p.type == 'image' %%}%s{%% else %%}{{ p.text }}"
    "{%% endif %%}{%% endfor %%}{%% endif %%} <end> {%% endfor %%}"
    "{%% if add_generation_prompt %%}assistant :{%% endif %%}"
)
TEXT = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def tokenizer(placeholder: str) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=512,
    )
    made.chat_template = TEMPLATE % placeholder
    return made


def _id(token: str) -> int:
    return SPECIAL.index(token)


def _smolvlm() -> tuple[Any, Any]:
    size = {"longest_edge": 16}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer("<image>"),
        VideoSettings({"video_processor_type": "SmolVLMVideoProcessor", "fps": 2}),
        image_seq_len=4,
        chat_template=TEMPLATE % "<image>",
    )
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "smolvlm_vision", **VISION},
        image_token_id=_id("<image>"),
        scale_factor=2,
    )
    return config, processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=512),
        tokenizer(placeholder),
        VideoSettings({"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2}),
        chat_template=TEMPLATE % placeholder,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=_id("<|image_pad|>"),
        video_token_id=_id("<|video_pad|>"),
        vision_start_token_id=_id("<|vision_start|>"),
        vision_end_token_id=_id("<|vision_end|>"),
    )
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    own = tokenizer("<start_of_image>")
    tokens = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    for name, token in zip(("boi_token", "eoi_token", "image_token"), tokens, strict=True):
        own._set_model_specific_special_tokens({name: token})
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        own,
        image_seq_length=4,
        chat_template=TEMPLATE % "<start_of_image>",
    )
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 16, "layer_types": None},
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=_id("<start_of_image>"),
        eoi_token_index=_id("<end_of_image>"),
        image_token_index=_id("<image_soft_token>"),
    )
    return config, processor


FAMILIES = {"smolvlm": _smolvlm, "qwen2_5_vl": _qwen2_5_vl, "gemma3": _gemma3}


def save(folder: Path, family: str) -> Path:
    """Save a tiny model and its processor; no tensor is as a constructor makes it."""
    with videos_unread():
        config, processor = FAMILIES[family]()
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def examples(folder: Path) -> Path:
    """Write records with no, one and two images, of several shapes."""
    one, wide, two = (
        picture(folder / f"{n}.png", n, size)
        for n, size in enumerate([(16, 16), (32, 16), (8, 24)])
    )
    ask = {"type": "text", "text": " which digit is this"}
    records: list[dict[str, Any]] = [
        {"image": one, "input": "which digit is this", "output": " one"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": wide}, ask]},
                {"role": "assistant", "content": " two"},
                {"role": "user", "content": [ask, {"type": "image", "path": two}]},
                {"role": "assistant", "content": " three four"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": " a b c"},
                {"role": "assistant", "content": " red blue"},
            ]
        },
        {"image": two, "text": " a five"},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "train.jsonl").write_text(lines)
    return folder / "train.jsonl"
