"""SaLoRA for PEFT, TRL and Axolotl: fine-tune an aligned chat model and keep its refusals."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Resolved on first use: hosts such as Axolotl import this package at every start, so it must not import torch.
_EXPORTS = {
    "RefusalAnchor": "salora_plugins.replay",
    "RefusalAnchorCallback": "salora_plugins.replay",
    "SaLoRAConfig": "salora_plugins.config",
    "SaLoRAModel": "salora_plugins.tuner",
    "SafetyModule": "salora_plugins.safety_module",
    "SafetyMonitorCallback": "salora_plugins.evaluation.monitor",
    "StrengthSearch": "salora_plugins.repair.strength",
    "apply_safe_lora": "salora_plugins.repair.safe_lora",
    "attribute": "salora_plugins.attribution",
    "audit": "salora_plugins.adapters.audit",
    "calibrate": "salora_plugins.calibration",
    "evaluate": "salora_plugins.evaluation.evaluate",
    "export_adapter": "salora_plugins.adapters.export",
    "last_complete_checkpoint": "salora_plugins.adapters.checkpoints",
    "load_adapter": "salora_plugins.resuming",
    "load_for_training": "salora_plugins.resuming",
    "mix_refusals": "salora_plugins.replay",
    "own_refusals": "salora_plugins.replay",
    "project_adapter": "salora_plugins.adapters.projection",
    "push_to_hub": "salora_plugins.adapters.publishing",
    "restore": "salora_plugins.repair.lssf",
}

__all__ = [
    "RefusalAnchor",
    "RefusalAnchorCallback",
    "SaLoRAConfig",
    "SaLoRAModel",
    "SafetyModule",
    "SafetyMonitorCallback",
    "StrengthSearch",
    "__version__",
    "apply_safe_lora",
    "attribute",
    "audit",
    "calibrate",
    "evaluate",
    "export_adapter",
    "last_complete_checkpoint",
    "load_adapter",
    "load_for_training",
    "mix_refusals",
    "own_refusals",
    "project_adapter",
    "push_to_hub",
    "restore",
]

if TYPE_CHECKING:
    __version__: str

    from .adapters.audit import audit
    from .adapters.checkpoints import last_complete_checkpoint
    from .adapters.export import export_adapter
    from .adapters.projection import project_adapter
    from .adapters.publishing import push_to_hub
    from .attribution import attribute
    from .calibration import calibrate
    from .config import SaLoRAConfig
    from .evaluation.evaluate import evaluate
    from .evaluation.monitor import SafetyMonitorCallback
    from .repair.lssf import restore
    from .repair.safe_lora import apply_safe_lora
    from .repair.strength import StrengthSearch
    from .replay import RefusalAnchor, RefusalAnchorCallback, mix_refusals, own_refusals
    from .resuming import load_adapter, load_for_training
    from .safety_module import SafetyModule
    from .tuner import SaLoRAModel


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = importlib.import_module("salora_plugins.support.version").package_version()
        globals()[name] = value
        return value
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hosts = importlib.import_module("salora_plugins.support.hosts")
    hosts.warn_of_unsupported(*hosts.in_use())
    with hosts.explained(*hosts.in_use()):
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
