from ditty_di.config import *  # noqa: F403
