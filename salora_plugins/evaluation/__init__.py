"""Measure a chat model: what it refuses, what it answers, and how well it fits held-out responses."""

from .generation import generate_responses
from .metrics import refusal_rate, response_loss
from .statistics import wilson_interval

__all__ = ["generate_responses", "refusal_rate", "response_loss", "wilson_interval"]
