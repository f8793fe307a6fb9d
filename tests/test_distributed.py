"""Two processes: every rank ends with the same factors and bases, whatever its own batch and share of the samples."""

from pathlib import Path

import pytest
import torch

from processes import run_ranks
from salora_plugins import SafetyModule, calibrate
from tiny import llama, smallest_cosine, token_rows

TRAINING = """
import sys
import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny import llama, token_batch, token_rows
from torch.nn.parallel import DistributedDataParallel
from salora_plugins import SaLoRAConfig
from salora_plugins.parametrization import safe_factor, trained_factor

dist.init_process_group("gloo")
rank = dist.get_rank()
config = SaLoRAConfig(
    r=4, safety_rank=8, input_safety_rank=4, task_rank=8, init="task", safety_data=token_rows(16),
    task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"],
)
model = get_peft_model(llama(), config)
parallel = DistributedDataParallel(model.train())
before = trained_factor(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]).detach().clone()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(2):
    tokens = token_batch(batch=2 + rank, seed=10 * rank + step)
    loss = parallel(input_ids=tokens, labels=tokens).loss
    if step == 0:
        expected = llama()(input_ids=tokens, labels=tokens).loss
        assert torch.allclose(loss, expected, rtol=1e-4), (loss, expected)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert not model.base_model.waiting_for_task_data
checked = 0
for name, module in model.named_modules():
    if name.endswith((".lora_A.default", ".lora_B.default")):
        factor = safe_factor(module)
        for tensor in (trained_factor(module).detach(), factor.offset, factor.basis, module.weight.detach()):
            other = tensor.clone()
            dist.broadcast(other, src=0)
            assert torch.equal(other, tensor), name
            checked += 1
assert checked == 4 * 2 * 4
start = safe_factor(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]).offset
assert not torch.allclose(start, before)
dist.destroy_process_group()
"""


CALIBRATION = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from tiny import llama, token_rows, tokenizer
from salora_plugins import SafetyModule, SaLoRAConfig, calibrate
from salora_plugins.calibration import calibrate_with, refusals, task_bases
from salora_plugins.rows.examples import Example
from salora_plugins.support.distributed import from_first_rank
from salora_plugins.rows.tokenizing import render_rows

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
options = {"safety_rank": 8, "input_safety_rank": 4, "calibration_cache": False, "target_modules": "all-linear"}
for engine in ("exact", "sketched"):
    for count in (40, 1):
        data = token_rows(count, length=40)
        module = calibrate(llama(), safety_data=data, calibration_engine=engine, **options)
        module.save(folder / f"{engine}-{count}-{rank}.safetensors")
shares = {**options, "safety_rank": 0.6, "input_safety_rank": 0.3}
calibrate(llama(), safety_data=token_rows(40, length=40), **shares).save(folder / f"shares-{rank}.safetensors")

bases = task_bases(llama(), SaLoRAConfig(task_rank=8, target_modules=["q_proj"]), token_rows(40, length=40))
torch.save(bases, folder / f"task-{rank}.pt")

# Who refuses does not matter here, but that both ranks keep the same answers, and each generated its share.
generated = []
answer = refusals.greedy_answers
def counting(model, tokenizer, prompts, **options):
    generated.extend(prompts)
    return answer(model, tokenizer, prompts, **options)
refusals.greedy_answers = counting
requests = [Example(messages=({"role": "user", "content": f"Request {i}"},)) for i in range(20)]
requests = render_rows(requests, tokenizer(), max_length=128, option="safety_data")
kept, counts = refusals.add_own_refusals(
    llama(), tokenizer(), requests, 12, is_refusal=lambda request, text: not request.endswith("3"), batch_size=4,
    max_length=128,
)
assert len(kept) == 12 and counts == {"requests": 13, "refusals": 12}, counts
assert len(generated) == 8, len(generated)
torch.save([(example.input_ids, example.labels) for example in kept], folder / f"kept-{rank}.pt")

# The second time every rank takes it from the cache, and no rank runs the model.
cached = {**options, "calibration_cache": True, "safety_data": token_rows(40, length=40)}
first = calibrate(llama(), **cached)
dist.barrier()
model = llama()
model.forward = None
second = calibrate(model, **cached)
assert all(torch.equal(first.bases[name], second.bases[name]) for name in first.bases)

# Machines that do not share a cache: only one rank finds it; then both do, with other directions under the same name.
own = folder / f"own-cache-{rank}"
os.environ |= {"SALORA_CACHE": str(own), "LOCAL_RANK": "0"}
if rank == 0:
    from_first_rank(lambda: calibrate(llama(), **cached) and b"done")
else:
    from_first_rank(bytes)
assert own.exists() == (rank == 0)
calibrate(llama(), **cached)
(file,) = own.glob("*.safetensors")
if rank == 1:
    turned = SafetyModule.load(file)
    next(iter(turned.bases.values())).neg_()
    turned.save(file)
dist.barrier()
found = calibrate(llama(), **cached)
assert all(torch.equal(first.bases[name], found.bases[name]) for name in first.bases)
dist.destroy_process_group()
"""


def test_two_ranks_end_with_the_same_bits(tmp_path):
    run_ranks(TRAINING, tmp_path)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    run_ranks(CALIBRATION, folder)
    return folder


OPTIONS = {"safety_rank": 8, "input_safety_rank": 4, "calibration_cache": False, "target_modules": "all-linear"}


@pytest.mark.parametrize("engine", ["exact", "sketched"])
@pytest.mark.parametrize("count", [40, 1])  # with one sample a rank has none of its own
def test_two_ranks_calibrate_as_one(calibrated, engine, count):
    first, second = (calibrated / f"{engine}-{count}-{rank}.safetensors" for rank in range(2))
    assert first.read_bytes() == second.read_bytes()
    found = SafetyModule.load(first)
    alone = calibrate(llama(), safety_data=token_rows(count, length=40), calibration_engine=engine, **OPTIONS)
    assert found.provenance["positions_counted"] == alone.provenance["positions_counted"]
    for name, energy in alone.sides["output"].energies.items():
        assert found.sides["output"].energies[name] == pytest.approx(energy, rel=1e-5)
    for ours, theirs in ((found.bases, alone.bases), (found.input_bases, alone.input_bases)):
        for name, basis in theirs.items():
            if engine == "exact":
                assert smallest_cosine(ours[name], basis) > 1 - 1e-5
    # Sketches depend on how the data is cut into batches, on random weights and tokens most of all.
    for ours, theirs in (
        (found.captured_energy, alone.captured_energy),
        (found.captured_input_energy, alone.captured_input_energy),
    ):
        for name, share in theirs.items():
            assert ours[name] == pytest.approx(share, rel=1e-5 if engine == "exact" else 0.15)


def test_two_ranks_agree_on_ranks_by_need(calibrated):
    first, second = (calibrated / f"shares-{rank}.safetensors" for rank in range(2))
    assert first.read_bytes() == second.read_bytes()
    options = {**OPTIONS, "safety_rank": 0.6, "input_safety_rank": 0.3}
    alone = calibrate(llama(), safety_data=token_rows(40, length=40), **options)
    for name, basis in SafetyModule.load(first).bases.items():
        assert basis.shape == alone.bases[name].shape


def test_two_ranks_find_the_same_task_directions_and_refusals(calibrated):
    for kind in ("task", "kept"):
        first, second = (torch.load(calibrated / f"{kind}-{rank}.pt") for rank in range(2))
        if kind == "task":
            assert all(torch.equal(first[name], basis) for name, basis in second.items())
        else:
            assert first == second
