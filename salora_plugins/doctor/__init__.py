"""What stands in the way of a run, found out before it: the installation, the machine, a model and its tokenizer."""

from .findings import Diagnosis, Finding
from .installation import examine_installation
from .model import examine_model

__all__ = ["Diagnosis", "Finding", "examine_installation", "examine_model"]
