"""Wines told apart by a table of 13 numbers: any nn.Module, by the classes of ditty."""

import torch
from sklearn.datasets import load_wine
from torch import nn

from ditty_di.api import ModelFactory, Pipeline
from ditty_di.losses import CrossEntropyLoss

table = load_wine()
x = torch.tensor(table.data, dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)
rows = list(zip(x, torch.tensor(table.target), strict=True))

pipeline = Pipeline(
    model_factory=ModelFactory.from_instance(
        nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    ),
    dataset=rows,
    loss_calculator=CrossEntropyLoss(),
    batch_size=32,
    lr=1e-2,
    epochs=20,
)
model = pipeline.run().eval()
right = sum(int(model(features).argmax() == label) for features, label in rows)
print({**pipeline.result, "accuracy": right / len(rows)})
