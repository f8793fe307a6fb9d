"""The `salora demo`: a tiny aligned chat model, fine-tuned with LoRA and with SaLoRA."""
