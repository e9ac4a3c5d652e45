"""How good a model is: confusion matrices and what follows from them."""

from .metrics import ConfusionMatrix

__all__ = ["ConfusionMatrix"]
