"""The states of a model in a checkpoint: its tensors, or those that its pretrained base lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from ditty_di.checkpoint.serialization import require_same
from ditty_di.fqn import canonical_fqn


def model_states(
    model_parts: Iterable[nn.Module], weights: Any = None
) -> dict[str, ModelState | BaseState]:
    """Return the states of a model: all of it, or what its pretrained base does not have.

    Args:
        model_parts: the model, or the pipeline stages of it that this rank has.
        weights: what filled the model. With `identity` (see `ditty_di.protocols.WeightsFn`) it can
            fill the frozen parameters again, so the base's identity is saved instead of them.
    """
    parts = list(model_parts)
    identity = getattr(weights, "identity", None)
    frozen = any(not p.requires_grad for part in parts for p in part.parameters())
    if identity is None or not frozen:
        return {"model": ModelState(parts)}
    return {"base": BaseState(identity()), "model": ModelState(parts, frozen=False)}


class BaseState:
    """The identity of the base that the frozen parameters belong to; loading another one fails.

    A base is identified by its `hash` alone: it may have been moved. A checkpoint without a base
    has its frozen parameters in it.

    Args:
        identity: `path`, `revision` and `hash`.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self._saved = True

    def state_dict(self) -> dict[str, Any]:
        """Return the identity, or nothing while a checkpoint without one is loaded."""
        return {"identity": self.identity} if self._saved else {}

    def prepare_load(self, saved: Mapping[str, Tensor | None]) -> None:
        """Note whether the checkpoint has an identity.

        Args:
            saved: see `ditty_di.checkpoint.states`.
        """
        self._saved = "identity" in saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's base.

        Args:
            state_dict: with `identity`, if the checkpoint has one.

        Raises:
            ValueError: it is another base.
        """
        self._saved = True
        if "identity" in state_dict:
            require_base(
                state_dict["identity"],
                self.identity,
                hint="set model.path to the first, or load.base=false to load them nevertheless",
            )


def require_base(there: Mapping[str, Any], here: Mapping[str, Any], *, hint: str) -> None:
    """Check that the frozen parameters are of the base that the checkpoint was trained on.

    Args:
        there: the identity in the checkpoint.
        here: the identity of the live base.
        hint: the end of the message.

    Raises:
        ValueError: they are of another base, both named.
    """
    if there["hash"] != here["hash"]:
        raise ValueError(
            f"the adapters were trained on the base {base_shown(there)}, and the base here is "
            f"{base_shown(here)}; {hint}"
        )


def base_shown(identity: Mapping[str, Any]) -> str:
    """Return `path@revision (hash 0123456789ab)`.

    Args:
        identity: `path`, `revision` and `hash`.
    """
    revision = f"@{identity['revision']}" if identity.get("revision") else ""
    return f"{identity['path']}{revision} (hash {identity['hash'][:12]})"


class ModelState:
    """The model's parameters and persistent buffers, under the names of the whole model.

    Args:
        model_parts: the model, or the pipeline stages of it that this rank has.
        frozen: whether parameters that are not trained are saved. If not, they are still loaded
            from a checkpoint that has them.
    """

    def __init__(self, model_parts: Iterable[nn.Module], *, frozen: bool = True) -> None:
        self.model_parts = list(model_parts)
        self.frozen = frozen
        self._loading: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name.

        Raises:
            ValueError: two parts (or two wrapped modules) have different tensors of one name.
        """
        merged: dict[str, Any] = {}
        for part in self.model_parts:
            for raw, value in self._of(part).items():
                name = canonical_fqn(raw)
                if name in merged:
                    raise ValueError(
                        f"two tensors of the model are called {name!r} (one is {raw!r}); every "
                        f"part must keep the names of the whole model"
                    )
                # A module's extra state may change its size; in a list it is saved as an object.
                merged[name] = [value] if raw.endswith(_EXTRA_STATE_KEY_SUFFIX) else value
        return merged

    def prepare_load(self, saved: Mapping[str, Tensor | None]) -> None:
        """Compare the checkpoint's entries with the model's.

        Args:
            saved: see `ditty_di.checkpoint.states`.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        self._loading = frozenset(saved)
        require_same(self.state_dict(), saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the tensors into the model.

        Args:
            state_dict: as `state_dict` returned it.
        """
        for part in self.model_parts:
            values = {raw: state_dict[canonical_fqn(raw)] for raw in self._of(part)}
            for raw in values:
                if raw.endswith(_EXTRA_STATE_KEY_SUFFIX):
                    (values[raw],) = values[raw]
            part.load_state_dict(values, strict=self.frozen)
        self._loading = frozenset()

    def _of(self, part: nn.Module) -> dict[str, Any]:
        """Return the entries of a part's state dict that are saved, or loaded now."""
        entries = part.state_dict()
        if self.frozen:
            return entries
        # By what is kept: quantized layers may put more into a state dict than parameters.
        kept = {name for name, _ in part.named_buffers(remove_duplicate=False)}
        kept |= {n for n, p in part.named_parameters(remove_duplicate=False) if p.requires_grad}
        kept = {canonical_fqn(name) for name in kept} | self._loading
        return {
            raw: value
            for raw, value in entries.items()
            if canonical_fqn(raw) in kept or raw.endswith(_EXTRA_STATE_KEY_SUFFIX)
        }
