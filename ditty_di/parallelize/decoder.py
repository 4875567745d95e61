"""Where a language model of transformers can be cut into pipeline stages.

A decoder is a list of blocks between modules that run before them (embeddings) and after them (the
last norm, the output projection). A stage has some of the blocks, and the first and the last one
have what is around them. That is right if nothing but the hidden states goes from block to block,
which a run of the model without its parameters shows (`read_decoder`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.messages import first_of
from ditty_di.models.skipped import Skipped, SkippedTable, first_argument
from ditty_di.models.towers import towers
from ditty_di.models.weights import initializer, is_meta, materialize, transformers_model
from ditty_di.parallelize.data_parallel import has_parameters, repeated_blocks
from ditty_di.seed import preserved_rng

#: Options of a configuration with which outputs of all blocks reach the loss.
OUTPUTS_OF_BLOCKS = ("output_router_logits", "output_hidden_states", "output_attentions")
_TOKENS = 8


@dataclass
class Decoder:
    """The parts of a decoder.

    Attributes:
        blocks: the repeated blocks.
        before: modules with parameters that run before the blocks, by path.
        after: modules with parameters that run after the blocks.
        values: number of values in the tuple that a block returns; 0 for a tensor.
        problems: why the model cannot be cut.
    """

    blocks: nn.ModuleList
    before: dict[str, nn.Module] = field(default_factory=dict)
    after: dict[str, nn.Module] = field(default_factory=dict)
    values: int = 0
    problems: list[str] = field(default_factory=list)

    def tied(self) -> list[str]:
        """Return the paths of modules before the blocks that share parameters with those after."""
        after = {id(p) for module in self.after.values() for p in module.parameters()}
        return [
            path
            for path, module in self.before.items()
            if any(id(p) in after for p in module.parameters())
        ]


def read_decoder(model: nn.Module) -> Decoder:
    """Return the parts of a model, with the reasons why it cannot be cut.

    Its own forward pass runs on a few tokens without any parameters: blocks and other modules are
    replaced by stand-ins, which record what they are called with, once from the embeddings on and
    then from a later block on. So the order of the modules is known, and whether a block needs
    more than its hidden states of what came before it.

    Args:
        model: of transformers, or one with such a model inside, such as peft's; on meta or with
            values. It is not changed.
    """
    _, base = transformers_model(model)
    blocks: Any = nn.ModuleList() if base is None else repeated_blocks(base)
    decoder = Decoder(blocks)
    config = getattr(base, "config", None)
    if not (isinstance(blocks, nn.ModuleList) and len(blocks)):
        decoder.problems.append(
            f"a {type(model).__name__} is not a model of transformers with a list of blocks; write "
            f"a function of your own for pipeline_fn (pipeline=titan is one for torchtitan's Llama)"
        )
    elif getattr(config, "is_encoder_decoder", False):
        decoder.problems.append(
            f"{type(base).__name__} has an encoder and a decoder, and stages are cut from one list "
            f"of blocks"
        )
    elif towers(model):
        decoder.problems.append(
            "a model that reads images has a tower beside its language model, and stages are cut "
            "from one list of blocks; write runtime.pp=1"
        )
    else:
        decoder.problems += _needs_all_blocks(model, config)
        outside, own = _around(model, blocks)
        if own:
            decoder.problems.append(f"the parameter {own[0]} is neither in a block nor in a module")
        if not decoder.problems:
            _follow(decoder, base, outside)
    return decoder


def _needs_all_blocks(model: nn.Module, config: Any) -> Iterator[str]:
    """Yield which settings need something from every block, or change the inputs of the first."""
    text = config.get_text_config()
    for name in OUTPUTS_OF_BLOCKS:
        if getattr(text, name, False):
            yield (
                f"{name}=true needs outputs of all blocks, and the loss gets those of the last "
                f"stage; write {name}=false in the model's configuration"
            )
    if getattr(model, "head_task", None) == "SEQ_CLS":
        yield (
            "a classifier of texts cannot be cut into stages: its head finds the last token of a "
            "row by the token ids, which only the first stage gets; write runtime.pp=1"
        )
    adapters = getattr(model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        yield "adapters that are prompts change the inputs of the model; use adapter=lora"


def _around(model: nn.Module, blocks: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the largest modules with parameters beside the blocks, and parameters beside them."""
    found: dict[str, nn.Module] = {}
    own: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        own.extend(f"{path}{name}" for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            if child is blocks or not has_parameters(child):
                continue
            if any(inner is blocks for inner in child.modules()):
                visit(child, f"{path}{name}.")
            else:
                found[f"{path}{name}"] = child

    visit(model, "")
    return found, own


# -- a run without parameters ---------------------------------------------------------------------


@dataclass
class _Run:
    """One forward pass of a model without parameters.

    Attributes:
        hidden: what each block returns, `[1, tokens, hidden]`.
        start: the first block that is recorded; those before it are skipped.
        values: as in `Decoder`.
        order: the modules in the order of their calls; blocks by number.
        calls: arguments of each recorded module but the first.
        broken: whether a block got something else than the hidden states of the one before it.
    """

    hidden: list[Tensor]
    start: int = 0
    values: int = 0
    order: list[int | str] = field(default_factory=list)
    calls: dict[int | str, tuple[Any, ...]] = field(default_factory=dict)
    broken: bool = False

    def record(self, name: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.order.append(name)
        self.calls[name] = (args[1:], dict(kwargs) if args else dict(list(kwargs.items())[1:]))


class _Block(Skipped):
    """In place of block number `number` of a run."""

    def __init__(self, runs: list[_Run], number: int) -> None:
        super().__init__()
        self.runs, self.number = runs, number

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.runs[-1]
        if self.number >= run.start:
            run.record(self.number, args, kwargs)
            found, before = first_argument(args, kwargs), run.hidden[self.number - 1]
            as_expected = torch.is_tensor(found) and found.shape == before.shape
            run.broken |= not as_expected or (self.number > 0 and not _same(found, before))
            # The other values are tensors, so that it shows if the next block gets them.
            others = [torch.full((1,), self.number) for _ in range(run.values - 1)]
            return (run.hidden[self.number], *others) if run.values else run.hidden[self.number]
        return Skipped(run.values).wrapped(run.hidden[self.number])


class _Other(nn.Module):
    """In place of a module beside the blocks."""

    def __init__(self, runs: list[_Run], path: str, stand_in: Skipped) -> None:
        super().__init__()
        self.runs, self.path, self.stand_in = runs, path, stand_in

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.runs[-1].record(self.path, args, kwargs)
        return self.stand_in(*args, **kwargs)


class _Embeddings(Skipped):
    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self.embedded = embedded

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.embedded


def _follow(decoder: Decoder, base: Any, outside: dict[str, nn.Module]) -> None:
    """Run the body of a model without parameters; sort the modules beside the blocks."""
    n, runs, ids = len(decoder.blocks), list[_Run](), torch.arange(2, 2 + _TOKENS)[None]
    with torch.no_grad(), preserved_rng(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        try:
            width = base.config.get_text_config().hidden_size
            hidden = [torch.randn(1, _TOKENS, width, generator=generator) for _ in range(n + 1)]
            skeleton = _without_parameters(base, decoder.blocks, outside, runs, hidden.pop())

            def run(values: int, start: int = 0, **inputs: Tensor) -> _Run:
                runs.append(_Run(hidden, start, values))
                skeleton(**inputs)
                return runs[-1]

            whole = _in_the_form_that_fits(run, ids, n)
            later = [
                run(whole.values, k, inputs_embeds=hidden[k - 1]) for k in {1, n - 1} if 0 < k < n
            ]
            differences = [problem for one in later for problem in _differences(whole, one)]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            decoder.problems.append(
                f"{type(base).__name__} cannot be followed from block to block ({reason})"
            )
            return
    decoder.values = whole.values
    decoder.problems += dict.fromkeys(differences)
    _sort(decoder, outside, whole.order)


def _in_the_form_that_fits(run: Callable[..., _Run], ids: Tensor, blocks: int) -> _Run:
    """Return the run in which each block gets the hidden states of the one before it."""
    failure: Exception = ValueError("its blocks do not get the hidden states of those before them")
    for values in range(3):
        try:
            whole = run(values, input_ids=ids)
        except Exception as error:
            failure = error
            continue
        if not whole.broken and {*range(blocks)} <= {*whole.order}:
            return whole
    raise failure


def _without_parameters(
    base: Any,
    blocks: nn.ModuleList,
    outside: dict[str, nn.Module],
    runs: list[_Run],
    embedded: Tensor,
) -> nn.Module:
    """Return a copy of a model's body on the CPU, with stand-ins for what has parameters."""
    stand_ins: dict[int, Any] = {id(b): _Block(runs, i).like(b) for i, b in enumerate(blocks)}
    embeddings = base.get_input_embeddings()
    for path, module in outside.items():
        stand_in = _Embeddings(embedded) if module is embeddings else instead_of(module)
        stand_ins[id(module)] = _Other(runs, path, stand_in)
    skeleton: Any = copy.deepcopy(base.base_model, stand_ins)
    skeleton.config.use_cache = False
    skeleton.eval()
    if is_meta(skeleton):
        materialize(skeleton, torch.device("cpu"))
        init = initializer(skeleton)
        for module in skeleton.modules():
            init(module)
    return skeleton.to("cpu")  # type: ignore[no-any-return]


def instead_of(module: nn.Module) -> Skipped:
    """Return what stands for a module beside the blocks in a stage that does not have it."""
    return (SkippedTable() if isinstance(module, nn.Embedding) else Skipped()).like(module)


def _sort(decoder: Decoder, outside: dict[str, nn.Module], order: list[int | str]) -> None:
    """Tell the modules that run before the blocks from those that run after them."""
    first = next(i for i, name in enumerate(order) if isinstance(name, int))
    last = max(i for i, name in enumerate(order) if isinstance(name, int))
    for path, module in outside.items():
        calls = [i for i, name in enumerate(order) if name == path]
        if calls and max(calls) < first:
            decoder.before[path] = module
        elif all(i > last for i in calls):  # also one that is called outside of the body: the head
            decoder.after[path] = module
        else:
            decoder.problems.append(f"{path} runs between the blocks")


def _differences(whole: _Run, later: _Run) -> list[str]:
    """Return what a block, or a module after them, gets that comes from before the cut."""
    found: dict[str, None] = {}
    for name, (args, kwargs) in later.calls.items():
        if isinstance(name, str) and name not in whole.order[whole.order.index(later.start) :]:
            continue  # it runs before the blocks
        its_args, its_kwargs = whole.calls[name]
        both = zip(args, its_args, strict=True)
        pairs = [(f"argument {i + 2}", a, b) for i, (a, b) in enumerate(both)]
        pairs += [(key, kwargs.get(key), value) for key, value in its_kwargs.items()]
        found |= {key: None for key, a, b in pairs if not _same(a, b)}
    if not found:
        return []
    return [f"its blocks get {first_of(found)} from before the block of the cut"]


def _same(a: Any, b: Any) -> bool:
    """Return whether two arguments are equal, and nothing that blocks could fill for others."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and bool(torch.isclose(a, b, 0.0, 0.0, equal_nan=True).all())
    if isinstance(a, dict):
        return bool(a) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        same = len(a) == len(b) and all(map(_same, a, b))
        return same and (bool(a) or isinstance(a, tuple))
    return True
