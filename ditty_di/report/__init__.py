"""Read the folders of runs, and show them: as a page, as a table in a terminal."""

from ditty_di.report.runs import Run, find, status

__all__ = ["Run", "find", "status"]
