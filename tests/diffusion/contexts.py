"""Contexts as the trainer makes them."""

import torch
from torch import nn

from ditty_di.batch import Context


def context(images, labels, *, step=1, training=True):
    model = nn.Identity().train(training)
    return Context(
        original_batch=({"input": images}, labels),
        target=labels,
        forward_kwargs={},
        epoch=0,
        step=step,
        max_steps=10,
        device=torch.device("cpu"),
        model=model,
    )
