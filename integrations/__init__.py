"""Thin integrations of SaLoRA into training frameworks; each is imported only by its own host."""
