"""Two processes: DDP as accelerate launches it, and FSDP2."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from certificate import largest_share_inside
from processes import free_port, run, run_alone, run_ranks
from salora_plugins import SafetyModule, SaLoRAConfig, calibrate
from tiny import llama, relative_difference, token_batch, token_rows

FSDP2 = """
import pytest
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
targets = ["q_proj", "v_proj", "down_proj"]
options = {"r": 4, "target_modules": targets, "safety_rank": 8, "input_safety_rank": 4, "init": sys.argv[2]}
model = get_peft_model(
    llama(), SaLoRAConfig(**options, safety_module=str(folder / "safety.safetensors"), task_type="CAUSAL_LM")
).train()
for layer in model.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
trained = [p for p in model.parameters() if p.requires_grad]
assert trained and all(isinstance(p, DTensor) for p in trained)
optimizer = torch.optim.AdamW(trained, lr=1e-2)
losses = []
for step in range(4):
    tokens = token_batch(batch=4, seed=step)
    mine = tokens[2 * rank : 2 * rank + 2]
    if step == 0:
        expected = llama()(mine).logits
        assert relative_difference(model(mine).logits, expected) < 1e-4
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(mean.item() / 2)

with pytest.raises(RuntimeError, match="sharded by FSDP") as caught:
    model.save_pretrained(folder / "refused")
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
model.eval()
logits = model(token_batch()).logits
if rank == 0:
    (folder / "refusal.txt").write_text(str(caught.value))
    model.save_pretrained(folder / "sharded", state_dict=full)
    torch.save((losses, logits), folder / "sharded.pt")
with pytest.raises(ValueError, match="salora calibrate"):
    get_peft_model(model.get_base_model(), SaLoRAConfig(**options))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=["pissa", "zero"])
def sharded(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("fsdp")
    calibrate(
        llama(),
        safety_data=token_rows(16),
        target_modules=["q_proj", "v_proj", "down_proj"],
        safety_rank=8,
        input_safety_rank=4,
    ).save(folder / "safety.safetensors")
    run_ranks(FSDP2, folder, request.param)
    return request.param, folder


@pytest.mark.compatibility("Several processes", "FSDP2 (`fully_shard`), calibrated before: training and saving")
def test_fsdp2_trains_as_one_process(sharded):
    init, folder = sharded
    losses, logits = torch.load(folder / "sharded.pt")
    model = get_peft_model(
        llama(),
        SaLoRAConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            safety_rank=8,
            input_safety_rank=4,
            init=init,
            safety_module=str(folder / "safety.safetensors"),
        ),
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step, expected in enumerate(losses):
        tokens = token_batch(batch=4, seed=step)
        loss = model(input_ids=tokens, labels=tokens).loss
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_difference(model.eval()(token_batch()).logits, logits) < 1e-3
    reloaded = PeftModel.from_pretrained(llama(), folder / "sharded")
    assert relative_difference(reloaded(token_batch()).logits, logits) < 1e-5
    assert largest_share_inside(folder / "sharded") <= 1e-5


@pytest.mark.compatibility("Several processes", "FSDP2: `save_pretrained` without the gathered weights")
def test_fsdp2_shards_are_not_saved(sharded, refusal):
    _, folder = sharded
    text = (folder / "refusal.txt").read_text()
    assert "get_model_state_dict" in text
    refusal(RuntimeError(text))
    assert not (folder / "refused" / "adapter_model.safetensors").exists()


IN_THE_RUN = """
import os
import time
import weakref
from datetime import timedelta

import pytest
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from salora_plugins.calibration import sharded
from salora_plugins.support.distributed import from_first_rank

os.environ["SALORA_CACHE"] = str(folder / "cache")
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "safety_rank": 8, "safety_data": token_rows(16)}


def loaded(shard):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if shard:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


loaded_whole, copies = sharded._loaded_whole, []


def loaded_in_a_cycle(*arguments):  # as hooks make one: only a collection frees it
    whole = loaded_whole(*arguments)
    whole.itself = [whole]
    copies.append(weakref.ref(whole))
    return whole


# Sharded: loaded anew by the first rank, once; the second time from the cache.
sharded._loaded_whole = loaded_in_a_cycle
for attempt in range(2):
    model = get_peft_model(loaded(True), SaLoRAConfig(**options))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, DTensor)
    model.base_model.safety_module().save(folder / f"sharded-{attempt}-{rank}.safetensors")
assert len(list((folder / "cache").glob("*.safetensors"))) == 1
assert bool(copies) == (rank == 0) and all(copy() is None for copy in copies)
sharded._loaded_whole = loaded_whole

# No room for it.
free, sharded.free_memory = sharded.free_memory, lambda: 1000
with pytest.raises(ValueError, match="it takes about .*; free are 0.0 MB on the CPU") as caught:
    get_peft_model(loaded(True), SaLoRAConfig(**options))
if rank == 0:
    (folder / "no-room.txt").write_text(str(caught.value))
sharded.free_memory = free

# As FSDP loads a model where only the first process is to read it: the others have zeros.
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
model = loaded(False)
assert rank or model.model.layers[0].self_attn.q_proj.weight.any()  # Transformers 5.24 has no zeros elsewhere either
model = get_peft_model(model, SaLoRAConfig(**options, calibration_cache=False))
model.base_model.safety_module().save(folder / f"zeros-{rank}.safetensors")

# The others wait for longer than the default group would.
dist.barrier()
(getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout)(timedelta(seconds=2))
assert from_first_rank(lambda: time.sleep(4) or b"done") == b"done"
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def in_the_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in_the_run")
    llama().save_pretrained(folder / "base")
    run_ranks(IN_THE_RUN, folder)
    return folder


@pytest.mark.compatibility(
    "Several processes", "FSDP2: calibrating in the run, on a copy that the first process loads whole"
)
def test_a_sharded_model_is_calibrated_in_the_run(in_the_run):
    expected = calibrate(
        llama(),
        safety_data=token_rows(16),
        target_modules=["q_proj", "down_proj"],
        safety_rank=8,
        calibration_cache=False,
    )
    for name in ("sharded-0-0", "sharded-0-1", "sharded-1-0", "sharded-1-1", "zeros-0", "zeros-1"):
        found = SafetyModule.load(in_the_run / f"{name}.safetensors")
        for side, bases in expected.sides.items():
            assert all(torch.equal(found.sides[side].bases[n], basis) for n, basis in bases.bases.items()), name


@pytest.mark.compatibility("Several processes", "FSDP2: calibrating in the run, where the whole model does not fit")
def test_a_sharded_model_that_does_not_fit(in_the_run, refusal):
    text = (in_the_run / "no-room.txt").read_text()
    assert "salora calibrate" in text and "sharded by FSDP" in text
    refusal(ValueError(re.sub(r"about [\d.]+ .B", "about ... MB", text)), hide=in_the_run)


@pytest.mark.compatibility("Several processes", "FSDP2: `fsdp_cpu_ram_efficient_loading`, by accelerate")
def test_weights_that_accelerate_hands_out_are_refused(monkeypatch, refusal):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: true") as caught:
        get_peft_model(llama(), SaLoRAConfig(target_modules=["q_proj"], safety_rank=8, safety_data=token_rows(16)))
    refusal(caught.value)


@pytest.mark.compatibility("Several processes", "FSDP2: `fsdp_state_dict_type: SHARDED_STATE_DICT`")
def test_checkpoints_in_shards_are_refused_before_training(monkeypatch, refusal):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="Set it to FULL_STATE_DICT") as caught:
        get_peft_model(llama(), SaLoRAConfig(target_modules=["q_proj"], safety_rank=8, safety_data=token_rows(16)))
    refusal(caught.value)


DDP = """
import json
import os
from trl import SFTConfig, SFTTrainer
from tiny import sum_rows, tokenizer

config = SaLoRAConfig(
    r=4, target_modules=["q_proj", "v_proj"], safety_rank=8, task_rank=8, safety_data=token_rows(16),
    task_data=token_rows(16, seed=3), task_type="CAUSAL_LM",
)
world_size = int(os.environ.get("WORLD_SIZE", 1))
trainer = SFTTrainer(
    model=llama(),
    args=SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=8 // world_size, max_steps=3, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, seed=1,
    ),
    train_dataset=sum_rows(24),
    processing_class=tokenizer(),
    peft_config=config,
)
trainer.train()
assert trainer.accelerator.num_processes == world_size
if world_size > 1:
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            other = parameter.detach().clone()
            dist.broadcast(other, src=0)
            assert torch.equal(other, parameter), name
trainer.save_model(str(folder / f"adapter-{world_size}"))
if trainer.accelerator.is_main_process:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / f"losses-{world_size}.json").write_text(json.dumps(losses))
trainer.accelerator.end_training()
"""


@pytest.mark.compatibility("Several processes", "DDP: SFTTrainer under `accelerate launch`, 2 processes")
def test_ddp_equals_one_process(tmp_path):
    pytest.importorskip("trl")
    # With --cpu, accelerate starts several processes by way of MPI only; this starts them as on GPUs.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch.append(f"--main_process_port={free_port()}")
    # Even on the CPU, accelerate would have the second process wait at a second GPU where there is one.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    run([*launch, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"], DDP, tmp_path, **hidden)
    run_alone(DDP, tmp_path, **hidden)
    two, one = (json.loads((tmp_path / f"losses-{count}.json").read_text()) for count in (2, 1))
    assert two == pytest.approx(one, rel=1e-3)
    tokens = token_batch()
    logits = [PeftModel.from_pretrained(llama(), tmp_path / f"adapter-{count}")(tokens).logits for count in (2, 1)]
    assert relative_difference(*logits) < 1e-2
    assert relative_difference(logits[0], llama()(tokens).logits) > 1e-2
    assert largest_share_inside(tmp_path / "adapter-2") <= 1e-5
