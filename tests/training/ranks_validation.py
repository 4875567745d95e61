"""Two ranks, three batches on one and one or none on the other: the loss is everybody's."""

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from ditty_di.callbacks import SampleText
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models.evaluation import evaluating
from ditty_di.parallelize.data_parallel import shard
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.runtime import Runtime
from ditty_di.training.forward import ForwardPass
from ditty_di.training.validation import Validator

VOCAB = 11


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


class Tokenizer:
    """Letters a, b, c, ... as tokens; the first one ends a document."""

    eos_token_id, bos_token_id, model_max_length = 0, None, 6

    def __call__(self, text):
        return {"input_ids": [ord(c) - 97 for c in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i + 97) for i in ids)


def make_batches(generator, valid):
    for number in valid:
        ids, labels = torch.randint(VOCAB, (2, 4, 3), generator=generator)
        labels.view(-1)[number:] = -100
        yield {"input": ids}, labels


def main(layout):
    runtime = Runtime(**{"dp_replicate": 2, "dp_shard": 1} if layout == "ddp" else {})
    torch.manual_seed(0)
    model, alone, loss_fn = Model(), Model(), CrossEntropyLoss()
    alone.load_state_dict(model.state_dict())
    # Without resharding after a forward pass: a validation has no backward pass to do it either.
    model = shard(model, parallel_dims=runtime.parallel_dims, reshard_after_forward=False)
    for other in ([2], []):
        of_rank = [[12, 1, 5], other]
        generator = torch.Generator().manual_seed(1)
        data = [list(make_batches(generator, valid)) for valid in of_rank]

        def loader(dp_rank, dp_world_size, data=data):
            assert dp_world_size == 2
            return data[dp_rank]

        validator = Validator(
            loader,
            eval_interval=1,
            model_parts=[model],
            evaluate=ForwardPass(
                parts=ModelParts([model]), loss_fn=loss_fn, runtime=runtime
            ).evaluate,
            loss_fn=loss_fn,
            runtime=runtime,
        )
        everything = [batch for rank in data for batch in rank]
        with torch.no_grad():
            sums = [
                F.cross_entropy(alone(i["input"]).flatten(0, 1), y.flatten(), reduction="sum")
                for i, y in everything
            ]
        expected = float(sum(sums)) / sum(sum(valid) for valid in of_rank)
        found = validator.validate(1)["loss"]
        assert abs(found - expected) < 1e-6, (found, expected)
        sample = SampleText(Tokenizer(), ["bcd", "e"], max_new_tokens=8, temperature=1.0)
        with evaluating([model]):
            texts = [*sample(forward=lambda x: model(x["input"]), device=runtime.device).values()]
        assert texts == runtime.broadcast(texts) and texts[0].startswith("bcd")
        assert all(isinstance(p, DTensor) for p in model.parameters()), "left unsharded"

    # A stop that only one rank has seen ends validation on both.
    if runtime.rank == 1:
        runtime.request_stop()
    assert validator.validate(2) == {}
    runtime.close()
    print("exact", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    # gloo's threads may outlive the interpreter and abort it (pytorch/pytorch#179291).
    os._exit(0)
