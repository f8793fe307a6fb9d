"""What a model says, and how likely it finds what it might say."""
