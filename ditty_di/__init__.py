"""Train PyTorch models from objects that are injected, by YAML or by Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the types of the lazy exports below
    from ditty_di.runtime import Runtime
    from ditty_di.training.trainer import Trainer

__version__ = "0.1.0"

# Imported on first use: the command line must answer without torch.
_EXPORTS = {"Runtime": "ditty_di.runtime", "Trainer": "ditty_di.training.trainer"}

__all__ = ["Runtime", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
