"""Integer graphs in plain Python integers, written from `docs/arithmetic.md` alone.

    arithmetic.py  formats, roundings, the arithmetic word, rescaling, encoding of factors, counts
    operators.py   one function per operator, over numpy object arrays that hold Python numbers

Nothing here imports qgraph or torch, and nothing is fast: every function is meant to be read next to the page.
"""

from . import functions as functions  # adds its operators to those of `operators`
from . import sampling as sampling  # adds its operators to those of `operators`
from . import softmax as softmax  # adds its operator to those of `operators`
