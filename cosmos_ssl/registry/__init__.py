"""Finds parts by the metadata of installed distributions, loads the named ones, and checks their options.

Listing reads metadata alone (``parts``), ``load`` imports (``loading``), a constructor's signature tells the options
(``options``, ``docs``). Imports errors and marks alone, and never torch: base classes are looked up when a part loads.
"""

from cosmos_ssl.registry.loading import class_name, forget, give_class, given_classes, load
from cosmos_ssl.registry.options import Option, check_options, describe_errors, marks, nested_options, options_of, shown
from cosmos_ssl.registry.parts import (
    CODE,
    GROUPS,
    NOT_INSTALLED,
    OWN,
    Record,
    canonical,
    check_installed,
    find,
    records,
    spelling,
)

__all__ = [
    "CODE",
    "GROUPS",
    "NOT_INSTALLED",
    "OWN",
    "Option",
    "Record",
    "canonical",
    "check_installed",
    "check_options",
    "class_name",
    "describe_errors",
    "find",
    "forget",
    "give_class",
    "given_classes",
    "load",
    "marks",
    "nested_options",
    "options_of",
    "records",
    "shown",
    "spelling",
]
