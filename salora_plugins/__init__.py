"""SaLoRA for PEFT, TRL and Axolotl: fine-tune an aligned chat model and keep its refusals."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Resolved on first use: hosts such as Axolotl import this package at every start, so it must not import torch.
_EXPORTS = {
    "SaLoRAConfig": "salora_plugins.config",
    "SaLoRAModel": "salora_plugins.tuner",
    "SafetyModule": "salora_plugins.safety_module",
    "SafetyMonitorCallback": "salora_plugins.monitor",
    "audit": "salora_plugins.audit",
    "calibrate": "salora_plugins.calibration",
    "evaluate": "salora_plugins.evaluation.evaluate",
    "export_adapter": "salora_plugins.export",
    "last_complete_checkpoint": "salora_plugins.checkpoints",
    "load_adapter": "salora_plugins.tuner",
    "load_for_training": "salora_plugins.tuner",
    "project_adapter": "salora_plugins.projection",
    "push_to_hub": "salora_plugins.publishing",
}

__all__ = [
    "SaLoRAConfig",
    "SaLoRAModel",
    "SafetyModule",
    "SafetyMonitorCallback",
    "__version__",
    "audit",
    "calibrate",
    "evaluate",
    "export_adapter",
    "last_complete_checkpoint",
    "load_adapter",
    "load_for_training",
    "project_adapter",
    "push_to_hub",
]

if TYPE_CHECKING:
    from .audit import audit
    from .calibration import calibrate
    from .checkpoints import last_complete_checkpoint
    from .config import SaLoRAConfig
    from .evaluation.evaluate import evaluate
    from .export import export_adapter
    from .monitor import SafetyMonitorCallback
    from .projection import project_adapter
    from .publishing import push_to_hub
    from .safety_module import SafetyModule
    from .tuner import SaLoRAModel, load_adapter, load_for_training


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
