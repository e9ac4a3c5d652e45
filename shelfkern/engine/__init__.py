"""From a model to its accelerated form: folded weights, a static plan over one arena, kernels."""

from .accelerate import FastShelfNet, accelerate, load
from .plan import Plan

__all__ = ["FastShelfNet", "Plan", "accelerate", "load"]
