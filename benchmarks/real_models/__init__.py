"""Refusals kept, and tasks learned, on chat models that others aligned."""
