"""What works with a family of models: the table in the README of `ditty_di.models`.

`python -m tests.models.table` computes it and writes it there.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from ditty_di import Trainer
from ditty_di.adapters import apply_adapter
from ditty_di.adapters import initialize as initialize_adapters
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import Loader, PackedCollate, PackedDataset, PaddedCollate
from ditty_di.export import AdapterExport, HuggingFaceExport
from ditty_di.generation import decoding
from ditty_di.losses import CrossEntropyLoss
from ditty_di.models import causal_lm
from ditty_di.models.pretrained import Pretrained
from ditty_di.parallelize.data_parallel import shard
from ditty_di.quantization import nf4
from ditty_di.runtime import Runtime
from tests.checkpoint import ranks
from tests.data.ragged import Documents
from tests.models.families import CAUSAL, EXPERTS, RARE, config
from tests.models.test_families import logits, save
from tests.models.test_hugging_face import tokenizer
from tests.models.tiny import fill

README = Path(__file__).parents[2] / "ditty_di/models/README.md"
BEGIN, END = "<!-- families: python -m tests.models.table -->\n", "<!-- end -->\n"

FAMILIES = (
    *("llama", "qwen3", "gemma3_text"),
    *EXPERTS,
    *("olmo_hybrid", "kimi_linear", "falcon_h1", "bamba", "jamba", "nemotron_h", "lfm2", "mamba2"),
    *("rwkv", "bloom"),
    *("dense_moe", "cross_layer_llama", "delta_net"),
)
COLUMNS = ("load", "full", "LoRA", "QLoRA", "packed", "FSDP2", "resume", "export", "generate")
DOCUMENTS = Documents([9, 3, 16, 1, 7, 12, 5, 14])
LORA = partial(apply_adapter, config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))


def make_base(name: str, folder: Path) -> Path:
    """Save a random model of a family as transformers saves it."""
    changes = {**RARE, **CAUSAL, "delta_net": RARE["olmo_hybrid"]}
    save(folder / name, config(name, changes.get(name, {})), "causal")
    return folder / name


def train(
    base: Path,
    runtime: Runtime,
    *,
    steps: int = 2,
    rows: int = 4,
    packed: bool = False,
    **options: Any,
) -> Trainer:
    """Train the model of a folder; `rows` are those of a micro-batch."""
    weights = Pretrained(base, init_missing=initialize_adapters)
    transforms = {n: options.pop(n) for n in ("adapter", "quantize") if n in options}
    data: Any = PackedDataset(DOCUMENTS, 40) if packed else DOCUMENTS
    trainer = Trainer(
        runtime=runtime,
        model=causal_lm.from_pretrained(base, **transforms),
        weights=weights,
        parallelize_fn=shard,
        loss_fn=CrossEntropyLoss(output="logits"),
        optimizer=partial(torch.optim.SGD, lr=0.05),
        dataloader=partial(
            Loader,
            data,
            micro_batch_size=2 if packed else rows,
            collate_fn=PackedCollate() if packed else PaddedCollate(),
        ),
        max_steps=steps,
        **options,
    )
    trainer.train()
    return trainer


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the parameters, gathered."""
    (model,) = trainer.model_parts
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def row(name: str, sharded: Any, folder: Path) -> list[str]:
    """Return the cells of a family.

    Args:
        name: `model_type`.
        sharded: its parameters after two steps on two ranks, or the refusal.
        folder: of `make_base`.
    """
    base = make_base(name, folder)
    stock = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(stock, "causal")
    runtime = Runtime(seed=0)
    trained: dict[str, Trainer] = {}

    def load() -> None:
        assert torch.equal(logits(fill(causal_lm.from_pretrained(base), base), "causal"), expected)

    def full() -> None:
        trained["full"] = train(base, runtime)
        (model,) = trained["full"].model_parts
        assert all(p.grad is not None for p in model.parameters())

    def adapted(kind: str, **quantize: Any) -> None:
        trained[kind] = trainer = train(base, runtime, adapter=LORA, **quantize)
        (model,) = trainer.model_parts
        AdapterExport(tokenizer(97), str(folder / kind / name), base=str(base))([model])
        assert any(p.any() for n, p in whole(trainer).items() if "lora_B" in n)
        if not quantize:
            again = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base), folder / kind / name
            )
            torch.testing.assert_close(logits(again, "causal"), logits(model, "causal"))

    def two_ranks() -> None:
        if isinstance(sharded, str):
            raise ValueError(sharded)
        for key, value in whole(trained["full"]).items():
            torch.testing.assert_close(torch.tensor(sharded[key]), value, rtol=0, atol=1e-5)

    def resume() -> None:
        checkpointer = partial(Checkpointer, str(folder / "checkpoints" / name), save_interval=1)
        train(base, runtime, steps=1, checkpointer=checkpointer).close()
        again = train(base, runtime, checkpointer=checkpointer)
        again.close()
        for key, value in whole(trained["full"]).items():
            assert torch.equal(whole(again)[key], value), key

    def export() -> None:
        (model,) = trained["full"].model_parts
        HuggingFaceExport(tokenizer(97), str(folder / "export" / name))([model])
        again = AutoModelForCausalLM.from_pretrained(folder / "export" / name)
        torch.testing.assert_close(logits(again, "causal"), logits(model, "causal"))

    def generate() -> None:
        (model,) = trained["full"].model_parts
        prompts, ends = [[5, 9, 11, 3], [7, 4]], [model.generation_config.eos_token_id]
        options = decoding.Options(max_new_tokens=5)
        found = decoding.hugging_face(model.eval(), prompts, options=options)
        for prompt, answer in zip(prompts, found, strict=True):
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad():
                best = model(ids, use_cache=False).logits.argmax(-1)[0].tolist()
            assert best[len(prompt) - 1 : -1] == answer
            assert len(answer) == options.max_new_tokens or best[-1] in ends

    tried: dict[str, Callable[[], Any]] = {
        "load": load,
        "full": full,
        "LoRA": partial(adapted, "lora"),
        "QLoRA": partial(adapted, "qlora", quantize=nf4),
        "packed": partial(train, base, runtime, packed=True),
        "FSDP2": two_ranks,
        "resume": resume,
        "export": export,
        "generate": generate,
    }
    try:
        return [cell(tried[column]) for column in COLUMNS]
    finally:
        for trainer in trained.values():
            trainer.close()
        runtime.close()


def cell(function: Callable[[], Any]) -> str:
    """Return "yes", or the clause of the refusal that says why."""
    try:
        function()
    except ValueError as error:
        return re.sub(r"^\w+: ", "", re.split(r" \(|; |\n", str(error))[0])
    return "yes"


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Return the parameters of each family after two steps, as numbers, or the refusal."""
    found: dict[str, Any] = {}
    runtime = Runtime(seed=0)
    for name in FAMILIES:
        try:
            trainer = train(folder / name, runtime, rows=2)
            found[name] = {n: p.numpy() for n, p in whole(trainer).items()}
            trainer.close()
        except ValueError as error:
            found[name] = str(error)
    runtime.close()
    return found


@contextmanager
def prepared() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a folder with the bases of all families, and what two ranks make of them."""
    with tempfile.TemporaryDirectory(dir=ranks.MEMORY) as path:
        folder = Path(path)
        for name in FAMILIES:
            make_base(name, folder)
        sharded, _ = ranks.run(on_two_ranks, 2, folder, timeout=300)
        yield folder, sharded


def line(*cells: str) -> str:
    """Return a line of the table."""
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Write the table."""
    lines = [line("family", *COLUMNS), line("---", *["---"] * len(COLUMNS))]
    with prepared() as (folder, sharded):
        lines += [line(f"`{n}`", *row(n, sharded[n], folder)) for n in FAMILIES]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + "".join(lines) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
