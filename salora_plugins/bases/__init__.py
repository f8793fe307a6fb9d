"""Ways to find safety directions beside SaLoRA's own, each a basis method that says what it needs."""
