"""What a frozen base costs in memory, while it is loaded and afterwards, and what training adds.

A Llama of random bfloat16 values is saved as safetensors in a temporary folder and loaded as it is,
in int8 and in NF4, by one process and by two (FSDP2 over gloo). Each process reports the moments
when it begins and ends loading; meanwhile this program reads how much anonymous memory it has
(RssAnon: the mapped files' pages do not count, for the system can drop them). What a process has
at its peak beyond what it had before, less what its tensors need in the end, must be at most two
layers in 16 bits. A mixture of experts is loaded likewise, from one tensor for each matrix; its
experts must need at most 0.54 bytes a parameter in NF4.

Then each way of fine-tuning takes one real step, and its parameters, gradients and optimizer state
are counted, tensor by tensor. Full fine-tuning keeps float32 parameters; adapters are float32 on a
bfloat16 base.

    launch/bench memory --json memory.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before any library reads them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _here import environment
from torch import Tensor, nn

MIB = 2**20
LOADS = ("bf16", "int8", "nf4", "nf4 double")
#: Of the mixture of experts; bytes a weight are those of its experts.
EXPERTS_LOADS = ("nf4", "int8")
METHODS = ("full AdamW", "full AdamW8bit", "LoRA", "int8 LoRA", "QLoRA")
#: Anonymous memory is read this often while a process loads.
SAMPLE_SECONDS = 0.001
LIMIT_BYTES_PER_WEIGHT = 0.54

#: Processes begin as copies of one that has imported what they need: that takes long.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "peft",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "ditty_di",
        "ditty_di.adapters",
        "ditty_di.training.setup",
        "ditty_di.losses",
        "ditty_di.models.pretrained",
        "ditty_di.parallelize.data_parallel",
        "ditty_di.quantization.experts",
        "ditty_di.runtime",
    ]
)


# -- what a measured process does -------------------------------------------------------------


def quantizer(name: str) -> Any:
    from ditty_di.quantization import int8, nf4

    return {
        "bf16": None,
        "int8": int8,
        "nf4": nf4,
        "nf4 double": partial(nf4, double_quant=True),
    }[name]


def build(base: str, *, quantize: str, adapters: bool, dtype: str) -> nn.Module:
    from ditty_di.models.causal_lm import from_pretrained

    adapter = None
    if adapters:
        from peft import LoraConfig

        from ditty_di.adapters import apply_adapter

        adapter = partial(apply_adapter, config=LoraConfig(r=16, target_modules="all-linear"))
    return from_pretrained(base, dtype=dtype, quantize=quantizer(quantize), adapter=adapter)


def place(model: nn.Module, base: str) -> nn.Module:
    from ditty_di import Runtime
    from ditty_di.adapters import initialize
    from ditty_di.models.pretrained import Pretrained
    from ditty_di.parallelize.data_parallel import shard
    from ditty_di.training.setup import setup_model

    runtime = Runtime()
    (placed,) = setup_model(
        model,
        runtime=runtime,
        weights=Pretrained(base, init_missing=initialize),
        parallelize_fn=shard,
        pipeline_fn=None,
    ).modules
    return placed


def load(base: str, quantize: str) -> dict[str, Any]:
    """Loads the base; when that began and ended, and what its tensors need on this rank."""
    import torch.distributed as dist

    # A first, small model: imports and the process group come before what is measured.
    small = f"{base}/small"
    place(build(small, quantize=quantize, adapters=False, dtype="bfloat16"), small)
    model: Any = build(base, quantize=quantize, adapters=False, dtype="bfloat16")
    dist.barrier()
    time.sleep(0.1)
    began = time.monotonic()
    model = place(model, base)
    ended = time.monotonic()
    packed = [m for m in model.modules() if isinstance(getattr(m, "in_features", None), int)]
    packed = [m for m in packed if m is not model.get_output_embeddings()]
    packed = [m for m in packed if hasattr(m, "multiply")] or packed  # experts alone
    weights = sum(m.in_features * m.out_features for m in packed) / dist.get_world_size()
    needed = sum(size(p) for m in packed for p in m.parameters(recurse=False))
    return {
        "began": began,
        "ended": ended,
        "tensor_bytes": sum(size(p) for p in model.parameters()),
        "bytes_per_weight": needed / weights,
    }


def train(base: str, method: str) -> dict[str, Any]:
    """One step of 1 x 128 tokens; bytes of each kind of tensor."""
    full = method.startswith("full")
    quantize = {"QLoRA": "nf4", "int8 LoRA": "int8"}.get(method, "bf16")
    dtype = "float32" if full else "bfloat16"
    model = place(build(base, quantize=quantize, adapters=not full, dtype=dtype), base)
    trained = [p for p in model.parameters() if p.requires_grad]
    make: Any = torch.optim.AdamW
    if method.endswith("8bit"):
        from torchao.optim import AdamW8bit

        make = AdamW8bit
    optimizer = make(trained, lr=1e-5)
    began = time.monotonic()
    tokens = torch.arange(128)[None]
    model(tokens).logits.float().logsumexp(-1).sum().backward()
    gradients = sum(size(p.grad) for p in trained if p.grad is not None)
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return {
        "began": began,
        "ended": time.monotonic(),
        "trained": sum(p.numel() for p in trained),
        "parameters": sum(size(p) for p in model.parameters()),
        "gradients": gradients,
        "optimizer_state": sum(size(t) for t in states),
    }


def size(tensor: Tensor) -> int:
    """Bytes that this process holds of it."""
    local = getattr(tensor, "_local_tensor", tensor)
    inner = getattr(local, "__tensor_flatten__", None)
    if inner is not None:
        return sum(size(getattr(local, name)) for name in inner()[0])
    return local.numel() * local.element_size()


# -- what starts and watches them -------------------------------------------------------------


def measured(ranks: int, task: Callable[..., dict[str, Any]], *arguments: str) -> list[Any]:
    """Runs a task in that many processes; what each returned, with its memory meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        process = PROCESSES.Process(target=run, args=(sender, place, task, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    samples: dict[int, list[tuple[float, int]]] = {p.pid: [] for p in processes if p.pid}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(samples, done))
    watcher.start()
    try:
        reports = [pipe.recv() for pipe in pipes]
    except EOFError:
        raise SystemExit(f"a process of {task.__name__}{arguments} ended early") from None
    finally:
        done.set()
        watcher.join()
        for process in processes:
            process.join()
    results = []
    for process, report in zip(processes, reports, strict=True):
        rows = samples[process.pid or 0]
        before = [rss for at, rss in rows if at < report["began"]][-1]
        during = [rss for at, rss in rows if report["began"] <= at <= report["ended"]]
        results.append({**report, "samples": len(during), "peak": max(during) - before})
    return results


def run(pipe: Any, place: dict[str, int], task: Any, arguments: tuple[str, ...]) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in place.items()})
    torch.set_num_threads(1)
    pipe.send(task(*arguments))
    os._exit(0)  # gloo's threads may outlive the interpreter


def watch(samples: dict[int, list[tuple[float, int]]], done: threading.Event) -> None:
    while not done.is_set():
        for pid, rows in samples.items():
            if (rss := anonymous(pid)) is not None:
                rows.append((time.monotonic(), rss))
        time.sleep(SAMPLE_SECONDS)


def anonymous(pid: int) -> int | None:
    """A process's anonymous resident memory in bytes; None when it has ended."""
    try:
        with open(f"/proc/{pid}/status") as lines:
            found = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return 1024 * int(found[0]) if found else None


def make_base(
    folder: Path, *, width: int, layers: int, vocabulary: int, experts: int = 0
) -> dict[str, int]:
    """Random values in bfloat16, a file for each layer; parameters and bytes of a layer.

    With experts it is a Qwen3-MoE, with one tensor an expert and matrix, as published.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, Qwen3MoeConfig

    from ditty_di.models.causal_lm import from_config

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "tie_word_embeddings": False,
    }
    config: Any = LlamaConfig(intermediate_size=11 * width // 4, **sizes)
    if experts:
        sizes |= {"num_experts": experts, "moe_intermediate_size": width // 2, "head_dim": 64}
        config = Qwen3MoeConfig(**sizes)
    config.save_pretrained(folder)
    model: Any = from_config(config, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        number = name.split(".")[2] if ".layers." in name else "rest"
        value = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            value.normal_(std=0.02, generator=generator)
        files.setdefault(f"model-{number}.safetensors", {}).update(published(name, value))
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_bytes": 2 * sum(p.numel() for p in model.model.layers[0].parameters()),
    }


def published(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor under its names in published files: a fused one is many there."""
    before, experts, last = name.partition(".experts.")
    if not experts:
        return {name: value}
    names = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
    return {
        f"{before}.experts.{i}.{own}.weight": matrix.contiguous()
        for i, both in enumerate(value)
        for own, matrix in zip(names, both.chunk(len(names)), strict=True)
    }


# -- the report ------------------------------------------------------------------------------


def report_loads(results: dict[str, Any]) -> None:
    print("loading, MiB of the rank that needs most (peak: beyond what it had before)\n")
    heads = ("B/weight", "tensors", "peak", "peak-tensors", "two layers", "ok")
    print(f"{'':24}" + "".join(f"{head:>14}" for head in heads))
    for name, r in results.items():
        cells = (r["tensor_bytes"], r["peak"], r["over"], r["limit"])
        line = f"{r['bytes_per_weight']:14.4f}" + "".join(f"{c / MIB:14.1f}" for c in cells)
        print(f"{name:24}{line}{'yes' if r['within'] else 'NO':>14}")


def report_methods(results: dict[str, Any]) -> None:
    print("\ntraining, one rank, MiB after a step of 128 tokens (peak: beyond what was there)\n")
    heads = ("trained, M", "parameters", "gradients", "optimizer", "sum", "peak of step")
    print(f"{'':24}" + "".join(f"{head:>14}" for head in heads))
    for name, r in results.items():
        cells = (r["parameters"], r["gradients"], r["optimizer_state"], r["sum"], r["peak"])
        line = "".join(f"{c / MIB:14.1f}" for c in cells)
        print(f"{name:24}{r['trained'] / 1e6:14.2f}{line}")


def worst_load(ranks: list[dict[str, Any]], layer: int) -> dict[str, Any]:
    for r in ranks:
        r["over"] = r["peak"] - r["tensor_bytes"]
    worst = max(ranks, key=lambda r: r["over"])
    limit = 2 * layer
    return {**worst, "limit": limit, "within": worst["over"] <= limit, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024, help="hidden size, in 128s")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=16, help="of the mixture, 4 layers")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    if not os.path.exists("/proc/self/status"):
        parser.error("this benchmark reads /proc, which only Linux has")
    settings = {name: getattr(options, name) for name in ("width", "layers", "vocabulary")}
    here = environment()
    loads: dict[str, Any] = {}
    methods: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), **settings)
        make_base(Path(folder) / "small", width=128, layers=1, vocabulary=256)
        for name in LOADS:
            for ranks in (1, 2):
                found = measured(ranks, load, folder, name)
                loads[f"{name}, {ranks} rank(s)"] = worst_load(found, base["layer_bytes"])
        folder_of_experts = Path(folder) / "experts"
        mixture = make_base(folder_of_experts, **{**settings, "layers": 4}, experts=options.experts)
        make_base(folder_of_experts / "small", width=128, layers=1, vocabulary=256, experts=2)
        for name in EXPERTS_LOADS:
            for ranks in (1, 2):
                found = measured(ranks, load, str(folder_of_experts), name)
                key = f"experts {name}, {ranks} rank(s)"
                loads[key] = worst_load(found, mixture["layer_bytes"])
        for name in METHODS:
            (found,) = measured(1, train, folder, name)
            found["sum"] = sum(found[k] for k in ("parameters", "gradients", "optimizer_state"))
            methods[name] = found
    print(f"\n{here['processor']}; {here['versions']}")
    print(f"Llama of {base['parameters'] / 1e6:.0f} M parameters, {settings}")
    print(f"mixture of {options.experts} experts, {mixture['parameters'] / 1e6:.0f} M parameters\n")
    report_loads(loads)
    report_methods(methods)
    if options.json:
        with open(options.json, "w") as file:
            results = {"base": base, "mixture": mixture, "loads": loads, "methods": methods}
            json.dump({"environment": here, "settings": settings, **results}, file, indent=2)
            file.write("\n")
    heavy = [n for n, r in loads.items() if "nf4" in n]
    too_many = [n for n in heavy if loads[n]["bytes_per_weight"] > LIMIT_BYTES_PER_WEIGHT]
    if failed := [n for n, r in loads.items() if not r["within"]] + too_many:
        sys.exit(f"over the limit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
