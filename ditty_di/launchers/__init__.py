"""Ways to start the ranks of a run: a launcher is called with a run directory."""

from ditty_di.launchers.local import Local

__all__ = ["Local"]
