"""Measure a chat model: what it refuses, what it answers, and how well it fits held-out responses."""

from .generation import generate_responses
from .intervals import wilson_interval
from .metrics import refusal_rate, response_loss

__all__ = ["generate_responses", "refusal_rate", "response_loss", "wilson_interval"]
