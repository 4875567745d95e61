"""The same losses as Hugging Face's Trainer, step by step (extra `[bench]`)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ditty_di.data import Loader
from ditty_di.losses import CrossEntropyLoss
from ditty_di.runtime import Runtime
from ditty_di.training.trainer import Trainer

pytest.importorskip("accelerate")
STEPS, ROWS, ACCUMULATION, VOCAB = 50, 2, 4, 96


def documents() -> list[list[int]]:
    """Ragged token ids, a third of each a prompt that is not learned."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 40, (STEPS * ROWS * ACCUMULATION,), generator=generator)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths.tolist()]


def padded(rows: list[list[int]], *, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        prompt = len(row) // 3
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, prompt : len(row)] = torch.tensor(row[prompt:])
    return (ids[:, :-1], labels[:, 1:]) if shift else (ids, labels)


def model(adapter: bool) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    from tests.models.tiny import llama

    torch.manual_seed(0)
    size = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64}
    made = LlamaForCausalLM(llama(**size, max_position_embeddings=64, use_cache=False))
    if not adapter:
        return made
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(made, config)


def ours(adapter: bool) -> list[float]:
    def collate(rows):
        ids, labels = padded(rows, shift=True)
        return {"input": ids}, labels

    runtime = Runtime(seed=0)
    losses: list[float] = []
    trainer = Trainer(
        model=model(adapter),
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1 - step / STEPS
        ),
        dataloader=partial(
            Loader, documents(), micro_batch_size=ROWS, shuffle=False, collate_fn=collate
        ),
        max_steps=STEPS,
        runtime=runtime,
        global_batch_size=ROWS * ACCUMULATION,
    )
    step = trainer.train_step

    def recording(data):
        step(data)
        losses.append(trainer.last_loss)

    trainer.train_step = recording
    trainer.train()
    runtime.close()
    return losses


def theirs(adapter: bool, folder: str) -> list[float]:
    import transformers

    losses: list[float] = []

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    def collate(rows):
        ids, labels = padded([row["ids"] for row in rows], shift=False)
        return {"input_ids": ids, "labels": labels}

    arguments = transformers.TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    rows = [{"ids": row} for row in documents()]
    Ordered(model(adapter), arguments, train_dataset=rows, data_collator=collate).train()
    windows = zip(*[iter(losses)] * ACCUMULATION, strict=True)
    return [sum(window) for window in windows]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_losses_equal_hugging_faces_trainer(adapter, tmp_path):
    mine, reference = ours(adapter), theirs(adapter, str(tmp_path))
    assert len(mine) == len(reference) == STEPS
    assert mine == pytest.approx(reference, rel=1e-4)
    assert mine[-1] != pytest.approx(mine[0], rel=1e-3)  # something was learned or moved
