"""Documents of a packed row: kept apart, or refused before the first step."""

import logging
from functools import partial

import pytest
import torch
import transformers as T

from ditty_di import Trainer
from ditty_di.data import Loader, Packed, PackedCollate, PaddedCollate, PaddingFreeCollate
from ditty_di.losses import CrossEntropyLoss
from ditty_di.metrics.validation import evaluating
from ditty_di.models import causal_lm
from ditty_di.models.weights import hugging_face, initialize
from tests.data.ragged import Documents

VOCAB = 64
HIDDEN = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
SMALL = {**HIDDEN, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
BART = {
    "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SSM = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}
DOCUMENTS = Documents([9, 3, 16, 1, 7, 12, 5, 14])

PLAIN, BOOLEAN, ADDITIVE = "position_ids alone", "boolean", "additive"
BY_LAYER = "for each kind of layer"
#: What keeps the documents apart; or the refusal.
ISOLATED = {
    "llama": (T.LlamaConfig, LLAMA, PLAIN),
    "gpt2": (T.GPT2Config, GPT2, PLAIN),
    "gptj": (T.GPTJConfig, {**GPT2, "rotary_dim": 4}, PLAIN),
    "codegen": (T.CodeGenConfig, {**GPT2, "rotary_dim": 4}, PLAIN),
    "gpt_bigcode": (T.GPTBigCodeConfig, GPT2, PLAIN),
    "gpt_neox": (T.GPTNeoXConfig, {**SMALL, "intermediate_size": 48}, PLAIN),
    "qwen3": (T.Qwen3Config, {**LLAMA, "head_dim": 8}, PLAIN),
    "gemma2": (T.Gemma2Config, {**LLAMA, "head_dim": 8, "sliding_window": 4}, PLAIN),
    "gemma3": (T.Gemma3TextConfig, {**LLAMA, "head_dim": 8, "sliding_window": 4}, PLAIN),
    "mistral": (T.MistralConfig, {**LLAMA, "sliding_window": 4}, PLAIN),
    "mixtral": (T.MixtralConfig, {**LLAMA, **MOE}, PLAIN),
    "phi": (T.PhiConfig, LLAMA, PLAIN),
    "persimmon": (T.PersimmonConfig, {**SMALL, "intermediate_size": 48}, PLAIN),
    "opt": (T.OPTConfig, {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, BOOLEAN),
    "falcon": (T.FalconConfig, SMALL, BOOLEAN),
    "biogpt": (T.BioGptConfig, {**SMALL, "intermediate_size": 48}, BOOLEAN),
    "bert": (T.BertConfig, {**SMALL, "intermediate_size": 48, "is_decoder": True}, BOOLEAN),
    "mpt": (
        T.MptConfig,
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        ADDITIVE,
    ),
    "xglm": (
        T.XGLMConfig,
        {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
         "max_position_embeddings": 64},
        ADDITIVE,
    ),
    "gpt_oss": (T.GptOssConfig, {**LLAMA, **MOE, "head_dim": 8, "sliding_window": 4}, BY_LAYER),
}  # fmt: skip
REFUSED = {
    "mamba": (T.MambaConfig, {**HIDDEN, "state_size": 4}, "state crosses documents"),
    "mamba2": (T.Mamba2Config, {**HIDDEN, **SSM}, "state crosses documents"),
    "jamba": (
        T.JambaConfig,
        {**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4},
        "state crosses documents",
    ),
    "bamba": (T.BambaConfig, {**LLAMA, **MAMBA2, "attn_layer_indices": [1]}, "state crosses"),
    "falcon_h1": (T.FalconH1Config, {**LLAMA, **MAMBA2, "mamba_d_ssm": 64}, "state crosses"),
    "lfm2": (T.Lfm2Config, {**LLAMA, "layer_types": ["conv", "full_attention"]}, "state crosses"),
    "recurrent_gemma": (
        T.RecurrentGemmaConfig,
        {**LLAMA, "lru_width": 32, "attention_window_size": 8,
         "block_types": ["recurrent", "attention"]},
        "state crosses documents",
    ),
    "rwkv": (
        T.RwkvConfig,
        {**HIDDEN, "attention_hidden_size": 32, "context_length": 64},
        "state crosses documents",
    ),
    "minimax": (
        T.MiniMaxConfig,
        {**LLAMA, **MOE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "state crosses documents",
    ),
    "bloom": (
        T.BloomConfig,
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "state crosses documents",
    ),
    "falcon_alibi": (T.FalconConfig, {**SMALL, "alibi": True}, "state crosses documents"),
    "bart": (T.BartConfig, BART, "state crosses documents|positions do not restart"),
    "trocr": (T.TrOCRConfig, BART, "state crosses documents|positions do not restart"),
}  # fmt: skip


def build(kind, options, **changes):
    try:
        return causal_lm.from_config(kind(**options, **changes))
    except ValueError:  # no sdpa
        return causal_lm.from_config(kind(**options, **changes), attn_implementation="eager")


def loader(how, documents=DOCUMENTS):
    if how == "packed":
        return partial(Loader, Packed(documents, 40), batch_size=2, collate_fn=PackedCollate())
    collates = {"padding_free": PaddingFreeCollate(), "padded": PaddedCollate()}
    return partial(Loader, documents, batch_size=4, collate_fn=collates[how])


def trainer(model, dataloader, **options):
    return Trainer(
        model=model,
        weights=partial(initialize, init=hugging_face),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        dataloader=dataloader,
        steps=1,
        **options,
    )


def difference_from_alone(made):
    """How far the logits of packed documents are from those of each alone, over a whole batch."""
    row = Packed(DOCUMENTS, 40)
    inputs, _ = PackedCollate()([row[0], row[1]])
    worst = 0.0
    with torch.no_grad(), evaluating(made.model_parts):
        packed = made.forward(inputs).logits
        for n in range(2):
            at = 0
            for member in row.members(n):
                ids = DOCUMENTS[member][0]["input"]
                alone = made.forward({"input": ids[None]}).logits[0]
                found = packed[n, at : at + len(ids)]
                worst, at = max(worst, float((found - alone).abs().max())), at + len(ids)
    return worst


@pytest.mark.parametrize("how", ["packed", "padding_free"])
@pytest.mark.parametrize("architecture", ISOLATED)
def test_documents_are_kept_apart(architecture, how, runtime, caplog):
    kind, options, form = ISOLATED[architecture]
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        made = trainer(build(kind, options), loader(how), runtime=runtime)
    assert difference_from_alone(made) < 1e-5
    said = [m for m in caplog.messages if "does not keep the documents" in m]
    assert [form in message for message in said] == ([] if form == PLAIN else [True])
    made.train()


@pytest.mark.parametrize("how", ["packed", "padding_free"])
@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_that_cannot_keep_documents_apart_is_refused(architecture, how, runtime):
    kind, options, message = REFUSED[architecture]
    model = build(kind, options)
    said = f"{kind.model_type}: .*({message}).*batching=padded or length_grouped"
    with pytest.raises(ValueError, match=said):
        trainer(model, loader(how), runtime=runtime)


def test_padded_rows_need_no_isolation(runtime):
    kind, options, _ = REFUSED["mamba"]
    trainer(build(kind, options), loader("padded"), runtime=runtime).train()
