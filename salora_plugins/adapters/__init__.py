"""Saved adapters: reading, certifying, auditing, projecting, exporting, describing and publishing them."""
