"""What a model says (`greedy`), and how likely it finds what it might say (`logits`)."""
