"""Where in the weights refusals sit: directions and entries are taken out, and what the model loses is measured."""

from __future__ import annotations

from .attributing import attribute

__all__ = ["attribute"]
