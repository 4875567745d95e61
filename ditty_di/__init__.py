"""Train PyTorch models from objects that are injected, by YAML or by Python."""

from typing import TYPE_CHECKING

from ditty_di.postponed import exports

if TYPE_CHECKING:  # the types of the lazy exports below
    from ditty_di.runtime import Runtime
    from ditty_di.training.trainer import Trainer

__version__ = "0.1.0"

# Imported on first use: the command line must answer without torch.
_EXPORTS = {"Runtime": "ditty_di.runtime", "Trainer": "ditty_di.training.trainer"}

__all__ = ["Runtime", "Trainer", "__version__"]

__getattr__, __dir__ = exports(globals(), _EXPORTS)
