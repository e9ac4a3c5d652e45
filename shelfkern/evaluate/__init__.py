"""How good a model is: confusion matrices, boundary scores, and what test servers want."""

from .boundary import BoundaryF1
from .evaluation import Evaluation, evaluate
from .labels import Labeller
from .metrics import ConfusionMatrix
from .protocol import PROTOCOLS, Protocol

__all__ = ["PROTOCOLS", "BoundaryF1", "ConfusionMatrix", "Evaluation", "Labeller", "Protocol", "evaluate"]
