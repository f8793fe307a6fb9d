"""Ways to find the protected directions of a layer, each registered as a basis method."""
