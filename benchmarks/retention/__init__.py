"""What is kept of a model's refusals at which task loss, by method (docs/evidence/safety-retention.md)."""
