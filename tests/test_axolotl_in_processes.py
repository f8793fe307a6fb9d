"""`axolotl train` in two processes of a CPU: FSDP2 and DDP, which end with the same weights."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("axolotl")

from axolotl_processes import axolotl_train

from certificate import largest_share_inside
from salora_plugins import SafetyModule, calibrate
from tiny import relative_difference


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    salora = {"safety_rank": 8, "safety_data": str(folder / "safety.jsonl")}
    changes = {"whole": {}, "resumed": {"resume_from_checkpoint": str(folder / "whole" / "checkpoint-2")}}
    axolotl_train(folder, "axolotl-fsdp2.yml", {"salora": salora}, changes)
    without_fsdp = {"salora": salora, "val_set_size": None}
    axolotl_train(folder, "axolotl-ddp.yml", without_fsdp, {"ddp": {}}, as_on_gpus=False)
    return folder


@pytest.mark.compatibility(
    "Several processes", "FSDP2 with Axolotl (examples/axolotl-fsdp2.yml), calibrated in the run"
)
def test_what_is_saved_is_outside(runs):
    expected = calibrate(
        AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32),
        AutoTokenizer.from_pretrained(runs / "base"),
        **{"safety_data": str(runs / "safety.jsonl"), "safety_rank": 8, "target_modules": ["q_proj", "v_proj"]},
        calibration_cache=False,
    )
    found = SafetyModule.load(runs / "whole")
    for side, bases in expected.sides.items():
        for module, basis in bases.bases.items():
            # The shares of two ranks are added up in another order than one process adds.
            assert (found.sides[side].bases[module] - basis).abs().max() < 1e-4, module
    assert largest_share_inside(runs / "whole") <= 1e-5
    assert largest_share_inside(runs / "whole" / "checkpoint-2") <= 1e-5


@pytest.mark.compatibility("Several processes", "FSDP2 with Axolotl: the saved adapter in plain PEFT")
def test_what_is_saved_is_what_was_trained(runs):
    """Axolotl gathers the factors for its last save itself; the checkpoint of the same step is the trainer's."""
    last = load_file(runs / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    final = load_file(runs / "whole" / "adapter_model.safetensors")
    assert final.keys() == last.keys()
    assert all(torch.equal(final[key], value) for key, value in last.items())
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32)
        before = base(tokens).logits
        loaded = PeftModel.from_pretrained(base, runs / "whole")
        assert (loaded(tokens).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resumed", marks=pytest.mark.compatibility("Resuming", "Axolotl under FSDP2")),
        pytest.param(
            "ddp", marks=pytest.mark.compatibility("Several processes", "DDP with Axolotl (examples/axolotl-ddp.yml)")
        ),
    ],
)
def test_another_way_to_the_same_weights(runs, name):
    expected = load_file(runs / "whole" / "adapter_model.safetensors")
    found = load_file(runs / name / "adapter_model.safetensors")
    assert all(relative_difference(found[key], value) < 1e-5 for key, value in expected.items())
    assert largest_share_inside(runs / name) <= 1e-5
