"""The command line: arguments, composition, one job, help."""
