"""Who decides whether an answer refuses or harms: phrases, a classifier, a model behind an endpoint."""
