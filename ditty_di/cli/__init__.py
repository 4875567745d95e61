"""The command line between `__main__` and the launchers: arguments, composition, one job."""
