"""Documents of a packed row: kept apart, or refused before the first step."""

import logging
from functools import partial

import pytest
import torch
import transformers as T

from ditty_di import Trainer
from ditty_di.data import Loader, PackedCollate, PackedDataset, PaddedCollate, PaddingFreeCollate
from ditty_di.isolation import FORMS, DocumentInputs
from ditty_di.isolation.rows import REHEARSED
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models import causal_lm, titan
from ditty_di.models.evaluation import evaluating
from ditty_di.models.weights import hugging_face, initialize
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.precision import float8
from ditty_di.precision.autocast import autocast
from ditty_di.processors import Teacher
from ditty_di.quantization import int8, nf4
from ditty_di.runtime import Runtime
from ditty_di.training.validation import Validator
from tests.checkpoint import ranks
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
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DOCUMENTS = Documents([9, 3, 16, 1, 7, 12, 5, 14])

PLAIN, BOOLEAN, ADDITIVE = "position_ids alone", "boolean", "additive"
BY_LAYER = "for each kind of layer"
SPLIT = "a row of its own for each document in recurrent layers"
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
    "mamba": (T.MambaConfig, {**HIDDEN, "state_size": 4}, SPLIT),
    "jamba": (
        T.JambaConfig,
        {**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4},
        SPLIT,
    ),
    "lfm2": (T.Lfm2Config, {**LLAMA, "layer_types": ["conv", "full_attention"]}, SPLIT),
}  # fmt: skip
REFUSED = {
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
        return partial(
            Loader, PackedDataset(documents, 40), micro_batch_size=2, collate_fn=PackedCollate()
        )
    collates = {"padding_free": PaddingFreeCollate(), "padded": PaddedCollate()}
    return partial(Loader, documents, micro_batch_size=4, collate_fn=collates[how])


def trainer(model, dataloader, **options):
    return Trainer(
        model=model,
        weights=partial(initialize, init=hugging_face),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        dataloader=dataloader,
        max_steps=1,
        **options,
    )


def difference_from_alone(made):
    """How far the logits of packed documents are from those of each alone, over a whole batch."""
    row = PackedDataset(DOCUMENTS, 40)
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


HOW = [
    *((name, "packed") for name in ISOLATED),
    *((name, "padding_free") for name in ("llama", "opt", "mpt", "gpt_oss", "mamba", "lfm2")),
]


@pytest.mark.parametrize(("architecture", "how"), HOW)
def test_documents_are_kept_apart(architecture, how, runtime, caplog):
    kind, options, form = ISOLATED[architecture]
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        made = trainer(build(kind, options), loader(how), runtime=runtime)
    assert difference_from_alone(made) < 1e-5
    said = [m for m in caplog.messages if "does not keep the documents" in m]
    assert [form in message for message in said] == ([] if form == PLAIN else [True])
    made.train()


REFUSED_HOW = [
    *((name, "packed") for name in REFUSED),
    *((name, "padding_free") for name in ("rwkv", "bloom", "bart")),
]


@pytest.mark.parametrize(("architecture", "how"), REFUSED_HOW)
def test_a_model_that_cannot_keep_documents_apart_is_refused(architecture, how, runtime):
    kind, options, message = REFUSED[architecture]
    model = build(kind, options)
    said = f"{kind.model_type}: .*({message}).*batching=padded or length_grouped"
    with pytest.raises(ValueError, match=said):
        trainer(model, loader(how), runtime=runtime)


def test_padded_rows_need_no_isolation(runtime):
    kind, options, _ = REFUSED["rwkv"]
    trainer(build(kind, options), loader("padded"), runtime=runtime).train()


# -- how the model computes ------------------------------------------------------------------------
COMPUTED = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "autocast": {"convert": autocast},
    "float8": {"dtype": "bfloat16", "convert": partial(float8.torchao, recipe="tensorwise")},
    "nf4": {"quantize": partial(nf4, block_size=16)},
    "int8": {"dtype": "bfloat16", "quantize": int8},
}


def outcome(architecture, runtime, **options):
    """The added inputs that were chosen, or the refusal."""
    kind, config, _ = {**ISOLATED, **REFUSED}[architecture]
    slots = ("parallelize_fn", "preprocessors", "pipeline_fn")
    training = {key: options.pop(key) for key in slots if key in options}
    try:
        model = causal_lm.from_config(kind(**config), **options)
    except ValueError:
        model = causal_lm.from_config(kind(**config), attn_implementation="eager", **options)
    try:
        made = trainer(model, loader("packed"), runtime=runtime, **training)
    except ValueError as error:
        return str(error).split(" (")[0]
    hooks = made.model_parts[0]._forward_pre_hooks.values()
    forms = [hook.form for hook in hooks if isinstance(hook, DocumentInputs)]
    return "".join(name for name, form in FORMS.items() if form in forms)


@pytest.mark.parametrize("computed", COMPUTED)
def test_the_probe_is_exact_in_every_precision(computed, runtime):
    options = COMPUTED[computed]
    assert outcome("llama", runtime, **options) == ""
    assert outcome("opt", runtime, **options) == "a 4-D boolean attention_mask"
    assert outcome("lfm2", runtime, **options) == SPLIT
    assert outcome("rwkv", runtime, **options) == "rwkv: state crosses documents"


def outcomes_of_a_rank(parallelize, degrees, **options):
    runtime = Runtime(seed=0, **degrees)
    names = ("llama", "opt", "mpt", "lfm2", "rwkv")
    found = [outcome(name, runtime, parallelize_fn=parallelize, **options) for name in names]
    runtime.close()
    return found


LAYOUTS = {
    "fsdp": (partial(shard, activation_checkpointing=full), {}),
    "fsdp in bfloat16": (partial(shard, param_dtype="bfloat16"), {}),
    "ddp": (shard, {"dp_replicate": -1, "dp_shard": 1}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_probe_together_and_agree(layout):
    masks = "a 4-D boolean attention_mask", "a 4-D additive attention_mask"
    expected = ["", *masks, SPLIT, "rwkv: state crosses documents"]
    assert ranks.run(outcomes_of_a_rank, 2, *LAYOUTS[layout]) == [expected, expected]


def stages(model, *, parallel_dims, **_):
    """A split of which only the modules are looked at; the first stage has no head."""
    rank = parallel_dims.get_mesh("pp").get_local_rank()
    if rank == 0:
        model.lm_head = torch.nn.Identity()
    return None, [model], rank == 0, rank == 1


def outcomes_of_a_stage():
    return outcomes_of_a_rank(shard, {"pp": 2}, pipeline_fn=stages)


def test_a_model_that_is_split_into_stages_is_probed_whole():
    added = "{}: the documents of a packed row see each other without {}, which pipeline stages do "
    added += "not get; use batching=padded or length_grouped, or runtime.pp=1"
    opt = added.format("opt", "a 4-D boolean attention_mask")
    mpt = added.format("mpt", "a 4-D additive attention_mask")
    lfm2 = added.format("lfm2", SPLIT)
    expected = ["", opt, mpt, lfm2, "rwkv: state crosses documents"]
    assert ranks.run(outcomes_of_a_stage, 2) == [expected, expected]


def test_packed_rows_that_are_split_over_ranks_are_refused():
    refused = "{}: packed rows cannot be split over ranks"
    expected = [refused.format(name) for name in ("llama", "opt", "mpt", "lfm2", "rwkv")]
    assert ranks.run(outcomes_of_a_rank, 2, shard, {"cp": 2}) == [expected, expected]


def test_positions_of_torchtitan_are_probed_as_well(runtime):
    """Scaled dot-product attention of torchtitan does not read them."""
    model = titan.llama3(dim=32, n_layers=2, n_heads=4, vocab_size=VOCAB, max_seq_len=64)
    rows = [
        ({"input": row["input"], "positions": row["position_ids"]}, ids)
        for row, ids in (Flattened()[n] for n in range(8))
    ]
    with pytest.raises(ValueError, match="Llama3Model: state crosses documents"):
        Trainer(
            model=model,
            loss_fn=CrossEntropyLoss(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            dataloader=partial(Loader, rows, micro_batch_size=2),
            max_steps=1,
            runtime=runtime,
        )


# -- siblings --------------------------------------------------------------------------------------
def test_a_cache_that_lets_documents_see_each_other_is_turned_off(runtime, caplog):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**LLAMA))
    assert model.config.use_cache
    with caplog.at_level(logging.INFO, logger="ditty_di"):
        made = trainer(model, loader("packed"), runtime=runtime)
    assert "use_cache=False" in caplog.text
    assert difference_from_alone(made) < 1e-5


def test_validation_rows_are_probed_as_well(runtime):
    kind, options, _ = REFUSED["rwkv"]
    validator = partial(Validator, loader("packed"), eval_interval=1)
    with pytest.raises(ValueError, match="rwkv: state crosses documents"):
        trainer(build(kind, options), loader("padded"), runtime=runtime, validator=validator)


def test_a_teacher_that_cannot_keep_documents_apart_is_refused(runtime):
    student, teacher = (
        build(*at[name][:2]) for at, name in ((ISOLATED, "llama"), (REFUSED, "rwkv"))
    )
    fill = partial(initialize, init=hugging_face)
    processors = [Teacher(teacher, output="logits", weights=fill)]
    with pytest.raises(ValueError, match="state crosses documents"):
        trainer(student, loader("packed"), runtime=runtime, preprocessors=processors)


class Flattened(torch.utils.data.Dataset):
    """Packed rows from a data set of one's own, through torch's own DataLoader."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(index, index + 24) % VOCAB
        return {"input": ids, "position_ids": torch.arange(12).repeat(2)}, ids


@pytest.mark.parametrize("kind", [Loader, torch.utils.data.DataLoader])
def test_rows_that_ones_own_data_set_packs_are_probed(kind, runtime):
    config, options, _ = REFUSED["rwkv"]
    with pytest.raises(ValueError, match="rwkv: state crosses documents"):
        trainer(build(config, options), kind(Flattened(), 2), runtime=runtime)


def test_the_probe_leaves_no_trace(runtime):
    made = trainer(build(*ISOLATED["llama"][:2]), loader("packed"), runtime=runtime)
    assert all(module.training for module in made.model_parts[0].modules())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    other = trainer(made.model_parts[0], loader("packed"), runtime=runtime)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in other.parts.parameters())


# -- rows and position tables ----------------------------------------------------------------------
SHORT = {
    "gpt2": {**GPT2, "n_positions": 16},
    "gptj": {**GPT2, "n_positions": 16, "rotary_dim": 4},
    "opt": {**ISOLATED["opt"][1], "max_position_embeddings": 16},
    "biogpt": {**ISOLATED["biogpt"][1], "max_position_embeddings": 16},
    "bert": {**ISOLATED["bert"][1], "max_position_embeddings": 16},
}


@pytest.mark.parametrize("architecture", SHORT)
def test_rows_beyond_the_position_table_are_refused(architecture, runtime):
    model = build(ISOLATED[architecture][0], SHORT[architecture])
    long = Documents([9, 17])
    said = f"{architecture}: rows of up to 17 tokens, the model has 16 positions.*data.seq_len=16"
    with pytest.raises(ValueError, match=said):
        trainer(model, loader("padded", long), runtime=runtime)
    trainer(model, loader("padded", Documents([9, 16])), runtime=runtime).train()


def test_a_data_set_without_lengths_shows_its_rows(runtime):
    model = build(T.GPT2Config, SHORT["gpt2"])
    rows = [({"input": torch.zeros(17, dtype=torch.long)}, torch.zeros(17, dtype=torch.long))] * 4
    with pytest.raises(ValueError, match="gpt2: rows of up to 17 tokens"):
        trainer(model, partial(Loader, rows, micro_batch_size=2), runtime=runtime)


def test_the_padding_of_a_packed_row_has_positions_too(runtime):
    """An example of 5 tokens in a row of 40 leaves 35 tokens of padding, positions 0 to 34."""
    rows = partial(
        Loader, PackedDataset(Documents([5]), 40), micro_batch_size=1, collate_fn=PackedCollate()
    )
    with pytest.raises(ValueError, match="gpt2: rows of up to 35 tokens"):
        trainer(build(T.GPT2Config, SHORT["gpt2"]), rows, runtime=runtime)


def test_computed_positions_are_warned_about_only(runtime, caplog):
    model = build(T.LlamaConfig, {**LLAMA, "max_position_embeddings": 16})
    trainer(model, loader("padded", Documents([9, 17])), runtime=runtime).train()
    assert "llama: rows of up to 17 tokens, beyond the 16" in caplog.text


# -- before anything is built ----------------------------------------------------------------------
def rehearsed(architecture, collate, seq_len=None, **changes):
    kind, options, _ = {**ISOLATED, **REFUSED}[architecture]
    model = build(kind, {**options, **changes})
    built = {
        "loss_fn": CrossEntropyLoss(),
        "model": model,
        "dataloader.collate_fn": collate,
        "dataloader.dataset.seq_len": seq_len,
    }
    warnings = Trainer.rehearse(built.get)
    assert all(p.is_meta for p in model.parameters()), "the graph's own model is left as it is"
    return warnings


def test_a_check_probes_a_small_model():
    assert rehearsed("llama", PackedCollate()) == []
    assert rehearsed("opt", PaddingFreeCollate()) == []
    assert rehearsed("rwkv", PaddedCollate()) == []
    with pytest.raises(ValueError, match="rwkv: state crosses documents"):
        rehearsed("rwkv", PackedCollate())


def test_a_check_probes_a_large_model_without_the_layers_that_repeat():
    wide = {"hidden_size": 512, "num_hidden_layers": 60}
    assert sum(p.numel() for p in build(T.RwkvConfig, wide).parameters()) > REHEARSED
    with pytest.raises(ValueError, match="rwkv: state crosses documents"):
        rehearsed("rwkv", PackedCollate(), **wide)


def test_a_check_compares_rows_with_the_position_table():
    (warning,) = rehearsed("gpt2", None, seq_len=65)
    assert "rows of up to 65 tokens, the model has 64 positions" in warning
    assert rehearsed("gpt2", None, seq_len=64) == rehearsed("llama", None, seq_len=65) == []
