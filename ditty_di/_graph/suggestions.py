"""Suggest the key or parameter that was probably meant by an unknown one."""

from __future__ import annotations

from collections.abc import Iterable

from ditty_di._graph.targets import did_you_mean

#: Names of other trainers for what has another name here; the first key that exists is proposed.
_SYNONYMS_TEXT = """
learning_rate: optimizer.lr
base_lr: optimizer.lr
adam_beta1: optimizer.betas
adam_beta2: optimizer.betas
beta1: optimizer.betas
beta2: optimizer.betas
adam_epsilon: optimizer.eps
adam_eps: optimizer.eps
optim: optimizer
optimiser: optimizer
scheduler: lr_scheduler
lr_scheduler_type: lr_scheduler
lr_schedule: lr_scheduler
warmup: lr_scheduler.warmup_steps
warmup_ratio: lr_scheduler.warmup_ratio
num_warmup_steps: lr_scheduler.warmup_steps
min_lr: lr_scheduler.min_lr_ratio
min_lr_ratio: lr_scheduler.min_lr_ratio
floor: lr_scheduler.min_lr_ratio
max_steps: steps
num_steps: steps
train_steps: steps
total_steps: steps
num_train_steps: steps
iterations: steps
max_iters: steps
num_train_epochs: epochs
num_epochs: epochs
max_epochs: epochs
n_epochs: epochs
batch_size: global_batch_size data.loader.batch_size
train_batch_size: global_batch_size
total_batch_size: global_batch_size
effective_batch_size: global_batch_size
gradient_accumulation_steps: global_batch_size
gradient_accumulation: global_batch_size
grad_accum: global_batch_size
accumulate_grad_batches: global_batch_size
per_device_train_batch_size: data.loader.batch_size
micro_batch_size: data.loader.batch_size
per_device_eval_batch_size: data.validation_loader.batch_size
eval_batch_size: data.validation_loader.batch_size
max_grad_norm: trainer.max_norm
grad_clip: trainer.max_norm
clip_grad: trainer.max_norm
grad_clipping: trainer.max_norm
gradient_clip: trainer.max_norm
gradient_clipping: trainer.max_norm
gradient_clip_val: trainer.max_norm
clip_grad_norm: trainer.max_norm
grad_norm: trainer.max_norm
bf16: precision=bf16
fp16: precision=fp16
fp8: precision=fp8
mixed_precision: precision=bf16
dtype: model.dtype
torch_dtype: model.dtype
gradient_checkpointing: recompute=full
activation_checkpointing: recompute=full
torch_compile: compile=blocks
load_in_4bit: quantize=nf4
load_in_8bit: quantize=int8
quantization: quantize
output_dir: run
save_dir: run
out_dir: run
run_name: name
experiment_name: name
resume_from_checkpoint: run
resume_from: run
eval_steps: validator.every
eval_interval: validator.every
val_check_interval: validator.every
eval_every: validator.every
save_steps: checkpoint.every
save_interval: checkpoint.every
save_every: checkpoint.every
save_total_limit: checkpoint.keep
keep_last: checkpoint.keep
logging_steps: metrics.every
log_every: metrics.every
log_interval: metrics.every
log_every_n_steps: metrics.every
report_to: metrics
logger: metrics
max_seq_length: data.seq_len data.max_tokens data.encoder.max_tokens
max_seq_len: data.seq_len data.max_tokens data.encoder.max_tokens
max_length: data.seq_len data.max_tokens data.encoder.max_tokens
sequence_len: data.seq_len data.max_tokens data.encoder.max_tokens
seq_length: data.seq_len data.max_tokens data.encoder.max_tokens
sequence_length: data.seq_len data.max_tokens data.encoder.max_tokens
block_size: data.seq_len
context_length: data.seq_len
model_name: model.path
model_name_or_path: model.path
base_model: model.path
model_path: model.path
pretrained_model_name_or_path: model.path
dataset: data.path data.corpus.path data
dataset_name: data.path data.corpus.path data
dataset_path: data.path data.corpus.path data
train_file: data.path data.corpus.path
val_set_size: data.validation_fraction
validation_split: data.validation_fraction
lora_r: adapter.config.r
lora_rank: adapter.config.r
rank: adapter.config.r
lora_alpha: adapter.config.lora_alpha
lora_dropout: adapter.config.lora_dropout
lora_target_modules: adapter.config.target_modules
target_modules: adapter.config.target_modules
num_workers: data.loader.num_workers
dataloader_num_workers: data.loader.num_workers
num_processes: launcher.nproc
nproc_per_node: launcher.nproc
num_gpus: launcher.nproc
gpus: launcher.nproc
devices: launcher.nproc
world_size: launcher.nproc
random_seed: seed
data_seed: seed
max_tokens: max_new_tokens
top_n: top_k
"""
SYNONYMS = {
    name: keys.split()
    for name, _, keys in (line.partition(": ") for line in _SYNONYMS_TEXT.strip().splitlines())
}


def suggest(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'optimizer.lr'?` for a dotted key among `known` ones, or nothing."""
    known = list(known)
    above, _, last = key.rpartition(".")
    proposed = _synonym(last, set(known))
    if proposed:
        return f"; did you mean {proposed!r}?"
    if last.lower() in SYNONYMS:
        usual = SYNONYMS[last.lower()][0]
        return f"; elsewhere it is {usual!r}, which is not in this configuration"
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == above}
    if hint := did_you_mean(last, siblings):
        name = hint.split("'")[1]
        return f"; did you mean {siblings[name]!r}?"
    elsewhere = sorted((k for k in known if k.endswith(f".{last}")), key=lambda k: k.count("."))
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return did_you_mean(key, known, cutoff=0.7)


def _synonym(name: str, known: set[str]) -> str:
    for key in SYNONYMS.get(name.lower().replace("-", "_"), ()):
        if key in known or "=" in key:
            return key
    return ""


def parameter(name: str, known: Iterable[str]) -> str:
    """As `suggest`, among the parameters of one callable."""
    known = list(known)
    for key in SYNONYMS.get(name.lower(), ()):
        last = key.rpartition(".")[2]
        if last in known and "=" not in key:
            return f"; did you mean {last!r}?"
    return did_you_mean(name, known)
