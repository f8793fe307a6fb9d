"""A user's model: its layers and their weights, how it is loaded, told from others and run."""
