"""Rows of data: reading them from where users keep them, rendering, tokenizing and batching them."""
