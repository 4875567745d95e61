"""Two heads and a composite loss: one names a digit, the other draws it again."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from ditty_di.api import ModelFactory, Pipeline
from ditty_di.losses import CompositeLoss, CrossEntropyCalculator, MSELoss
from ditty_di.processors import PreProcessor


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
        self.name, self.draw = nn.Linear(16, 10), nn.Linear(16, 64)

    def forward(self, image):
        features = self.body(image)
        return self.name(features), self.draw(features)


class KeepImage(PreProcessor):
    contract = "0:2:f32 -> | ctx.image:2:f32"

    def process(self, batch, ctx):
        ctx["image"] = batch
        return batch, ctx


digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1

pipeline = Pipeline(
    model_factory=ModelFactory.from_instance(TwoHeads()),
    dataset=list(zip(images, torch.tensor(digits.target), strict=True)),
    preprocessors=[KeepImage()],
    loss_calculator=CompositeLoss(
        [
            (CrossEntropyCalculator(output_index=0), 1.0),
            (MSELoss(output_index=1, target_key="image"), 2.0),
        ]
    ),
    batch_size=64,
    lr=3e-3,
    max_steps=200,
)
pipeline.run()
print(pipeline.result)
