"""Run a model with few of its repeated blocks, and compute from that what all of them take.

Counts grow by the same amount with every further block of a kind, and so does the memory at each
moment: in the first and in the last block of a kind, forward and backward, and outside of all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from torch import nn

from ditty_di.models.weights import on_meta
from ditty_di.parallelize.data_parallel import repeated_blocks

#: Counts by key: a `Counter`, some of whose values are seconds. Blocks in keys are their
#: positions in the whole model.
Counts = Any


def with_blocks(module: nn.Module, blocks: Iterable[int]) -> nn.Module:
    """Return a copy of a module on the meta device that has some of its repeated blocks.

    Args:
        module: not sharded; its values are not copied.
        blocks: positions of the blocks that the copy keeps. Blocks without parameters, which stand
            in for those of other pipeline stages, are always kept.
    """
    container = repeated_blocks(module)
    children = list(container.children())
    kept = set(blocks)
    kept |= {i for i, child in enumerate(children) if not any(True for _ in child.parameters())}
    placeholder = nn.Identity()
    memo: dict[int, Any] = {id(c): placeholder for i, c in enumerate(children) if i not in kept}
    made = on_meta(module, memo)
    cut = memo.get(id(container), container)  # a model without blocks has no container
    for name in [n for n, child in cut._modules.items() if child is placeholder][::-1]:
        del cut[int(name) if isinstance(cut, nn.ModuleList) else name]
    _cut_lists(made, len(children), sorted(kept))
    return made


def _cut_lists(module: nn.Module, blocks: int, kept: list[int]) -> None:
    """Cut the lists of a configuration with an entry for each block, such as `layer_types`."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        own: dict[str, Any] = getattr(config, "__dict__", {})
        own.update(
            (name, [value[i] for i in kept])
            for name, value in own.items()
            if isinstance(value, list) and len(value) == blocks
        )


def kinds(module: nn.Module, treatment: Mapping[int, Hashable]) -> list[list[int]]:
    """Return the positions of the repeated blocks that have parameters, one list for each kind.

    Args:
        module: not sharded.
        treatment: how a parameter is trained, by `id`.
    """
    found: dict[Hashable, list[int]] = defaultdict(list)
    for i, block in enumerate(repeated_blocks(module).children()):
        parameters = list(block.parameters())
        if parameters:
            trained = tuple(treatment.get(id(parameter)) for parameter in parameters)
            found[signature(block), trained].append(i)
    return list(found.values())


def signature(block: nn.Module) -> Hashable:
    """Return what two blocks share that compute alike: modules, shapes, dtypes, and text settings.

    Numbers are left out, for the position of a block is one.
    """
    parts: list[Hashable] = []
    for path, module in block.named_modules():
        own = vars(module).items()
        said = [(k, v) for k, v in own if k[0] != "_" and isinstance(v, str | bool | None)]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(n, t.shape, t.dtype, t.requires_grad) for n, t in tensors]
        parts.append((path, type(module), tuple(said), tuple(shapes)))
    return tuple(parts)


def count_all(
    module: nn.Module,
    of_kind: list[list[int]],
    run: Callable[[nn.Module, list[int]], Counts],
) -> tuple[Counts, bool]:
    """Return the counts of a module with all its blocks, from runs with few of them.

    Run are the first and the last block of each kind, then one more of each kind, and as a check
    two more of the commonest; where that does not fit, again with the first two of each kind.

    Args:
        module: not sharded.
        of_kind: see `kinds`.
        run: counts a copy on meta that has the blocks at the positions given, in that order.

    Returns:
        The counts, and whether they are linear in the blocks; if not, all blocks were run.
    """
    everything = [i for kind in of_kind for i in kind]

    def counted(blocks: Iterable[int]) -> Counts:
        kept = sorted(blocks)
        return run(with_blocks(module, kept), kept)

    for first in (1, 2):  # some layouts treat the second block of a kind unlike the others
        base = {i for kind in of_kind for i in (*kind[:first], kind[-1])}
        left = [[i for i in kind if i not in base] for kind in of_kind]
        most = max(range(len(left)), key=lambda i: len(left[i]), default=0)
        if not left or len(left[most]) < 2:
            counted(everything)  # see below
            return counted(everything), True
        few = counted(base)
        more = [counted(base | {own[0]}) if own else few for own in left]
        check = counted(base | set(left[most][:2]))
        for _ in range(2):
            whole = _grown(few, more, [2 * (i == most) for i in range(len(left))])
            if _equal(whole, check):
                edges = Counter(
                    {key: n for key, n in few.items() if base.issuperset(_positions(key))}
                )
                return _grown(edges, more, [len(own) for own in left]), True
            # The first time that DTensor meets a shape it runs the operation once more, to learn
            # it.
            few = counted(base)
    return counted(everything), False


def _grown(few: Counts, more: list[Counts], number: list[int]) -> Counts:
    """Return the counts with further blocks of each kind, one of which each of `more` has."""
    total: Counts = Counter(few)
    for n, other in zip(number, more, strict=True):
        for key, value in few.items():
            total[key] += n * (other[key] - value)
    return total


def _positions(key: Iterable[Any]) -> set[int]:
    return {part for part in key if isinstance(part, int)}


def _equal(predicted: Counts, measured: Counts) -> bool:
    """Return whether counts agree; a block that only one of them has is left out."""
    return all(
        abs(value - measured[key]) <= 1e-6 * abs(value)
        for key, value in predicted.items()
        if key in measured
    )
