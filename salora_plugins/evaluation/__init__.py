"""Measuring what a fine-tuned model refuses, over-refuses and has learned."""
