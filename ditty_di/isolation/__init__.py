"""Keep the documents of a packed row apart: probe the model, add inputs where it needs them."""

from ditty_di.isolation.copies import copy_of_each_kind
from ditty_di.isolation.forms import FORMS, DocumentInputs
from ditty_di.isolation.probe import Isolation, NotIsolated
from ditty_di.isolation.rows import check_rows, isolation_of, rehearse

__all__ = [
    "FORMS",
    "DocumentInputs",
    "Isolation",
    "NotIsolated",
    "check_rows",
    "copy_of_each_kind",
    "isolation_of",
    "rehearse",
]
