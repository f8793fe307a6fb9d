"""The built-in prompt sets, written for this project."""

from __future__ import annotations
