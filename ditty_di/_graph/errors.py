from ditty_di.config.errors import *  # noqa: F403
