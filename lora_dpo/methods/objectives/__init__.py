"""What can be learned from pairs: `base` says what an objective is, the others are the answers to `method.kind =`."""

from lora_dpo.methods.objectives.base import Need, Objective, PairErrors
from lora_dpo.methods.objectives.of_margin import Dmpo, Dpo, Hinge, Ipo, OfMargin
from lora_dpo.methods.objectives.others import Dspo, Kto, Mapo, Sft

__all__ = [
    "Dmpo",
    "Dpo",
    "Dspo",
    "Hinge",
    "Ipo",
    "Kto",
    "Mapo",
    "Need",
    "Objective",
    "OfMargin",
    "PairErrors",
    "Sft",
]
