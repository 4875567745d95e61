"""How the CPU threads of a rank wait for each other."""

from __future__ import annotations

import os

#: Turns of the loop in which a thread of GNU OpenMP waits for work before it sleeps. Its default
#: (300,000) burns the time of other processes, and of the thread that it waits for, as soon as the
#: machine has something else to do; sleeping at once costs time alone. `launch/bench threads`
#: measures both.
SPIN_COUNT = 10_000

_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Set how long OpenMP threads of this process and its children spin, unless the user has.

    Takes effect where torch has not been imported: the library reads it when it is loaded.
    """
    if not any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
