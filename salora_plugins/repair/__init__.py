"""What can be done for the refusals of a model that is fine-tuned already: LSSF's fusion, Safe LoRA's projection."""
