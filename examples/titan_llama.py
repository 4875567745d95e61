"""A torchtitan Llama with torchtitan's own parallelize function, injected from Python."""

from functools import partial

from ditty_di import Trainer
from ditty_di.data import Loader, TokenDataset, python_docs, tokenize, train_bpe
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.titan import llama3
from ditty_di.models.weights import initialize, torchtitan
from ditty_di.optim import cosine

# isort: split
# After ditty_di, which makes torchtitan run on older torch and without a GPU.
import torch
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.models.llama3 import parallelize_llama

STEPS = 30
corpus = python_docs()
tokenizer = train_bpe(corpus.train, vocab_size=2048, model_max_length=128)
rows = TokenDataset(tokenize(corpus.train, tokenizer), seq_len=128)

trainer = Trainer(
    model=llama3(vocab_size=len(tokenizer), dim=128, n_layers=4, n_heads=4, max_seq_len=128),
    weights=partial(initialize, init=torchtitan),
    parallelize_fn=partial(
        parallelize_llama,
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        compile_config=CompileConfig(),
        ac_config=None,
        dump_folder="outputs",
    ),
    loss_fn=CrossEntropyLoss(),
    optimizer=partial(torch.optim.AdamW, lr=1e-3),
    lr_scheduler=partial(cosine, max_steps=STEPS, warmup_steps=5),
    dataloader=partial(Loader, rows, micro_batch_size=8),
    max_steps=STEPS,
)
print(trainer.train())
trainer.close()
