"""earlybird: draw the ticket early, shrink at once, train only the small network, and show the bill.

import earlybird as eb

bird = eb.EarlyBird(keep=0.5).attach(model, optimizer, example_inputs=x, steps_per_epoch=len(loader))
...  # your loop; the ticket is drawn and the model shrinks inside optimizer.step()
print(bird.bill())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `earlybird --help` answers before torch is imported.
_HOMES = {
    "EarlyBird": "earlybird.tickets.early_bird",
    "EarlyBert": "earlybird.tickets.early_bert",
    "AtInit": "earlybird.tickets.at_init",
    "FixedTicket": "earlybird.tickets.fixed",
    "DynamicSparse": "earlybird.sparse.dynamic",
    "Iterative": "earlybird.tickets.iterative",
    "UnitSearch": "earlybird.tickets.early_bert",
    "BatchDropping": "earlybird.skipping.batches",
    "LayerSkipping": "earlybird.skipping.layers",
    "StochasticDepth": "earlybird.skipping.stochastic_depth",
    "ProgressivePrecision": "earlybird.precision.progressive",
    "FractionalPrecision": "earlybird.precision.fractional",
    "PredictiveSign": "earlybird.precision.predictive_sign",
    "BlockFloat": "earlybird.precision.block_float",
    "ShiftAdd": "earlybird.arithmetic.shift_add",
    "ProgressiveResizing": "earlybird.skipping.pixels",
    "Search": "earlybird.tickets.search",
    "Ticket": "earlybird.tickets.ticket",
    "draw": "earlybird.tickets.draw",
    "draw_units": "earlybird.tickets.draw",
    "shrink": "earlybird.tickets.shrink",
    "Change": "earlybird.tickets.shrink",
    "use_kernels": "earlybird.kernels.install",
    "Step": "earlybird.step",
    "Ledger": "earlybird.ledger",
    "Bill": "earlybird.cost.bill",
}
__all__ = [
    "AtInit", "BatchDropping", "Bill", "BlockFloat", "Change", "DynamicSparse", "EarlyBert", "EarlyBird",
    "FixedTicket", "FractionalPrecision", "Iterative", "LayerSkipping", "Ledger", "PredictiveSign",
    "ProgressivePrecision", "ProgressiveResizing", "Search", "ShiftAdd", "Step", "StochasticDepth", "Ticket",
    "UnitSearch", "__version__", "draw", "draw_units", "shrink", "use_kernels",
]  # fmt: skip

if TYPE_CHECKING:
    from earlybird.arithmetic.shift_add import ShiftAdd
    from earlybird.cost.bill import Bill
    from earlybird.kernels.install import use_kernels
    from earlybird.ledger import Ledger
    from earlybird.precision.block_float import BlockFloat
    from earlybird.precision.fractional import FractionalPrecision
    from earlybird.precision.predictive_sign import PredictiveSign
    from earlybird.precision.progressive import ProgressivePrecision
    from earlybird.skipping.batches import BatchDropping
    from earlybird.skipping.layers import LayerSkipping
    from earlybird.skipping.pixels import ProgressiveResizing
    from earlybird.skipping.stochastic_depth import StochasticDepth
    from earlybird.sparse.dynamic import DynamicSparse
    from earlybird.step import Step
    from earlybird.tickets.at_init import AtInit
    from earlybird.tickets.draw import draw, draw_units
    from earlybird.tickets.early_bert import EarlyBert, UnitSearch
    from earlybird.tickets.early_bird import EarlyBird
    from earlybird.tickets.fixed import FixedTicket
    from earlybird.tickets.iterative import Iterative
    from earlybird.tickets.search import Search
    from earlybird.tickets.shrink import Change, shrink
    from earlybird.tickets.ticket import Ticket


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'earlybird' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
