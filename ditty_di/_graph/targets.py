from ditty_di.config.targets import *  # noqa: F403
