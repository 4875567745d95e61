"""A model, a loss and a loader of one's own, any optimizer: no YAML, no registry."""

from functools import partial

import torch
from torch import nn

from ditty_di import Trainer
from ditty_di.data import Loader
from ditty_di.optim import cosine


class Absolute:
    """A loss counts its valid elements, and divides its sum by their number in the whole step."""

    def num_valid(self, batch):
        return torch.tensor(batch.labels.numel())

    def __call__(self, output, batch, num_valid_global):
        return (output - batch.labels).abs().sum() / num_valid_global, {}


x = torch.randn(4096, 8)
y = x.sin().sum(1, keepdim=True)
rows = [({"input": a}, b) for a, b in zip(x, y, strict=True)]

trainer = Trainer(
    model=nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)),
    loss_fn=Absolute(),
    optimizer=partial(torch.optim.Adafactor, lr=3e-2),
    lr_scheduler=partial(cosine, max_steps=300),
    dataloader=partial(Loader, rows, micro_batch_size=64),
    max_steps=300,
)
print(trainer.train())
trainer.close()
