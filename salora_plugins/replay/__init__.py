"""
Training on the model's own refusals beside the task.

`refusals` has the base model answer harmful requests and keeps what it refuses; `mixing` puts those rows among the
training rows (safety data mixing, also called replay); `anchor` is a penalty instead, the KL divergence from the base
model where refusals begin. `trainers` does both in trainers of transformers.
"""

from .anchor import RefusalAnchor
from .mixing import mix_refusals
from .refusals import Refusal, own_refusals
from .trainers import RefusalAnchorCallback, mix_into_training_set

__all__ = ["Refusal", "RefusalAnchor", "RefusalAnchorCallback", "mix_into_training_set", "mix_refusals", "own_refusals"]
