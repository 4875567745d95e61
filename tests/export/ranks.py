"""Ranks export sharded models of every kind; on one rank the same models unsharded."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from ditty_di.adapters import apply_adapter, initialize
from ditty_di.export import AdapterExport, HuggingFaceExport, MergedExport
from ditty_di.losses import skip_lm_head
from ditty_di.models import causal_lm, seq2seq
from ditty_di.models.pretrained import Pretrained
from ditty_di.parallelize.activation_checkpointing import full
from ditty_di.parallelize.data_parallel import shard
from ditty_di.quantization import nf4
from ditty_di.runtime import Runtime
from ditty_di.training.setup import setup_model


def main(folder, bases):
    runtime = Runtime()
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    sharding = partial(shard, activation_checkpointing=full, reshard_after_forward=False)

    def placed(model, base):
        parts = setup_model(
            model,
            runtime=runtime,
            weights=Pretrained(base, init_missing=initialize),
            parallelize_fn=sharding,
            pipeline_fn=None,
        )
        return parts.modules

    grown = AutoTokenizer.from_pretrained(bases["llama"])
    grown.add_tokens(["<|one|>", "<|two|>", "<|three|>"])
    model = causal_lm.from_pretrained(bases["llama"], tokenizer=grown, head=skip_lm_head)
    (whole,) = placed(model, bases["llama"])
    with torch.no_grad():  # leaves the outermost parameters gathered
        whole(torch.zeros(1, 3, dtype=torch.long))
    HuggingFaceExport(grown, str(folder / "full"))([whole])
    (encoder_decoder,) = placed(seq2seq.from_pretrained(bases["t5"]), bases["t5"])
    HuggingFaceExport(tokenizer, str(folder / "t5"))([encoder_decoder])

    lora = partial(apply_adapter, config=LoraConfig(r=4, target_modules="all-linear"))
    model = causal_lm.from_pretrained(
        bases["llama"], tokenizer=grown, quantize=nf4, adapter=lora, head=skip_lm_head
    )
    (adapted,) = placed(model, bases["llama"])
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:  # the same values on any layout
                local = getattr(parameter, "_local_tensor", parameter)
                local.fill_(0.01 * (1 + i % 5))
    AdapterExport(grown, str(folder / "adapter"))([adapted])
    MergedExport(grown, str(folder / "merged"))([adapted])
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    # gloo's threads may outlive the interpreter and abort it (pytorch/pytorch#179291).
    os._exit(0)
