"""
DeepSpeed ZeRO on two processes and a CPU, where DeepSpeed is installed; it compiles its communication first.

accelerate, and with it the trainers, have DeepSpeed on accelerators only, or in one process: see
`processes.AS_ON_GPUS`.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import salora_plugins.demo
from certificate import largest_share_inside
from processes import AS_ON_GPUS, CPUS_AS_GPUS, LAUNCHER, free_port, run, run_ranks
from salora_plugins import SafetyModule, SaLoRAConfig, calibrate
from tiny import llama, refusal_rows, relative_difference, sum_rows, token_batch, token_rows, tokenizer

pytest.importorskip("deepspeed")

EXAMPLES = Path(__file__).parent.parent / "examples"
OPTIONS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "safety_rank": 8, "task_type": "CAUSAL_LM"}

ZERO = """
import json
import deepspeed
import pytest
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from salora_plugins import calibrate

stage, options = int(sys.argv[2]), json.loads(sys.argv[3])
deepspeed.init_distributed(dist_backend="gloo")
rank = dist.get_rank()
settings = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
active = HfDeepSpeedConfig(settings) if stage == 3 else None
base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
refusals = {}
if stage == 3:
    assert base.model.layers[0].self_attn.q_proj.weight.numel() == 0
    with pytest.raises(ValueError, match="salora calibrate") as caught:
        calibrate(base, safety_data=token_rows(16), target_modules=["q_proj"], safety_rank=8)
    refusals["calibrating"] = str(caught.value)
if stage == 3:
    # Without a module: the first rank loads the model whole, outside of ZeRO-3, and calibrates on that.
    made = get_peft_model(base, SaLoRAConfig(**options, safety_data=token_rows(16)))
    made.base_model.safety_module().save(folder / f"in-the-run-{rank}.safetensors")
    assert is_deepspeed_zero3_enabled()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    assert base.model.layers[0].self_attn.q_proj.weight.numel() == 0
options = {**options, "safety_module": str(folder / "safety.safetensors")}
if stage == 3:
    with pytest.raises(ValueError, match="init='pissa'") as caught:
        get_peft_model(base, SaLoRAConfig(**options, task_data=token_rows(16)))
    refusals["task"] = str(caught.value)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
model = get_peft_model(base, SaLoRAConfig(**options, init="pissa")).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
losses = []
for step in range(4):
    tokens = token_batch(batch=4, seed=step)
    mine = tokens[2 * rank : 2 * rank + 2]
    loss = engine(input_ids=mine, labels=mine).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(mean.item() / 2)
engine.eval()
with torch.no_grad():
    logits = engine(token_batch()).logits.detach().clone()
state_dict = None
if stage == 3:
    engine.empty_partition_cache()
    with pytest.raises(RuntimeError, match="ZeRO-3") as caught:
        model.save_pretrained(folder / "refused")
    refusals["saving"] = str(caught.value)
    state_dict = engine._zero3_consolidated_16bit_state_dict()
if rank == 0:
    model.save_pretrained(folder / f"stage{stage}", state_dict=state_dict)
    torch.save((losses, logits), folder / f"stage{stage}.pt")
    (folder / f"refusals{stage}.json").write_text(json.dumps(refusals))
dist.barrier()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    calibrate(llama(), safety_data=token_rows(16), target_modules=OPTIONS["target_modules"], safety_rank=8).save(
        folder / "safety.safetensors"
    )
    for stage in (2, 3):
        run(LAUNCHER, ZERO, folder, str(stage), json.dumps(OPTIONS), DS_ACCELERATOR="cpu")
    return folder


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(2, marks=pytest.mark.compatibility("Several processes", "DeepSpeed ZeRO stage 2")),
        pytest.param(
            3, marks=pytest.mark.compatibility("Several processes", "DeepSpeed ZeRO stage 3, calibrated before")
        ),
    ],
)
def test_zero_trains_as_one_process(folder, stage):
    losses, logits = torch.load(folder / f"stage{stage}.pt")
    config = SaLoRAConfig(**OPTIONS, init="pissa", safety_module=str(folder / "safety.safetensors"))
    model = get_peft_model(llama(), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step, expected in enumerate(losses):
        tokens = token_batch(batch=4, seed=step)
        loss = model(input_ids=tokens, labels=tokens).loss
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert relative_difference(model.eval()(token_batch()).logits, logits) < 1e-4
    reloaded = PeftModel.from_pretrained(llama(), folder / f"stage{stage}")
    assert relative_difference(reloaded(token_batch()).logits, logits) < 1e-5
    assert largest_share_inside(folder / f"stage{stage}") <= 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.compatibility("Several processes", what))
        for kind, what in {
            "calibrating": "DeepSpeed ZeRO stage 3: calibrating on the sharded model",
            "task": 'DeepSpeed ZeRO stage 3: `init="task"` with `task_data`',
            "saving": "DeepSpeed ZeRO stage 3: `save_pretrained` without the gathered weights",
        }.items()
    ],
)
def test_what_zero3_cannot_do(folder, kind, refusal):
    refusal(RuntimeError(json.loads((folder / "refusals3.json").read_text())[kind]), hide=folder)
    assert not (folder / "refused" / "adapter_model.safetensors").exists()


@pytest.mark.compatibility(
    "Several processes", "DeepSpeed ZeRO stage 3: calibrating in the run, on a copy that the first process loads whole"
)
def test_zero3_is_calibrated_in_the_run(folder):
    expected = SafetyModule.load(folder / "safety.safetensors")
    for rank in range(2):
        found = SafetyModule.load(folder / f"in-the-run-{rank}.safetensors")
        for side, bases in expected.sides.items():
            assert all(torch.equal(found.sides[side].bases[name], basis) for name, basis in bases.bases.items())


TRAINER = """
from trl import SFTConfig, SFTTrainer
from tiny import sum_rows, tokenizer
import json
# Stage 3 is calibrated in the run, on the same rows.
given = {"safety_module": str(folder / "safety.safetensors")} if "zero2" in sys.argv[2] else {}
config = SaLoRAConfig(**json.loads(sys.argv[3]), init=sys.argv[4], **(given or {"safety_data": token_rows(16)}))
trainer = SFTTrainer(
    model=str(folder / "base"),
    args=SFTConfig(
        output_dir=str(folder / sys.argv[5]), deepspeed=sys.argv[2], max_steps=4, save_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=4, logging_steps=1, report_to="none", bf16=False, gradient_checkpointing=False,
        lr_scheduler_type="constant", model_init_kwargs={"dtype": "float32"},
    ),
    train_dataset=sum_rows(),
    processing_class=tokenizer(),
    peft_config=config,
)
trainer.train()
trainer.save_model(str(folder / sys.argv[5] / "adapter"))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
(folder / sys.argv[5] / "losses.json").write_text(json.dumps(losses))
"""
ONE = [*LAUNCHER[:-2], "--nproc-per-node=1", "--standalone"]


@pytest.mark.compatibility(
    "Several processes", "DeepSpeed with SFTTrainer (examples/deepspeed-zero2.json, -zero3.json)"
)
def test_sft_with_the_examples(folder):
    pytest.importorskip("trl")
    losses = {}
    for stage in (2, 3):
        out = f"sft{stage}"
        # accelerate passes over DeepSpeed where it is told to use the CPU, and finds that by itself.
        example = str(EXAMPLES / f"deepspeed-zero{stage}.json")
        run(
            ONE,
            TRAINER,
            folder,
            example,
            json.dumps(OPTIONS),
            "pissa",
            out,
            ACCELERATE_USE_CPU="false",
            DS_ACCELERATOR="cpu",
        )
        losses[stage] = json.loads((folder / out / "losses.json").read_text())
        assert largest_share_inside(folder / out / "adapter") <= 1e-5
        assert largest_share_inside(folder / out / "checkpoint-4") <= 1e-5
    assert losses[2] == pytest.approx(losses[3], rel=1e-5)
    assert losses[2][-1] < losses[2][0]
    logits = [PeftModel.from_pretrained(llama(), folder / f"sft{s}" / "adapter")(token_batch()).logits for s in (2, 3)]
    assert relative_difference(*logits) < 1e-4
    assert relative_difference(logits[0], llama()(token_batch()).logits) > 1e-2


DEMO = Path(salora_plugins.demo.__file__).parent / "model"
ANSWERED = {  # by the model itself, which the first rank does alone
    "target_modules": ["q_proj", "v_proj"],
    "safety_rank": 4,
    "input_safety_rank": 4,
    "num_safety_samples": 16,
}
IN_THE_RUN = (
    AS_ON_GPUS
    + """
import json
import os
import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from salora_plugins.calibration import sharded
from tiny import sum_rows

demo, zero3, options = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
rank = os.environ["RANK"]
os.environ["SALORA_CACHE"] = str(folder / f"cache-{rank}")  # as machines have their own
args = SFTConfig(
    output_dir=str(folder / "out"), deepspeed=zero3, max_steps=2, learning_rate=1e-2, per_device_train_batch_size=4,
    report_to="none", bf16=False, save_strategy="no", model_init_kwargs={"dtype": "float32"},
)
loaded, whole = sharded._loaded_whole, []


def counted(*arguments):
    whole.append(loaded(*arguments))
    return whole[-1]


sharded._loaded_whole = counted


def given(**more):  # a model that was loaded in shards before; one process has no second trainer with DeepSpeed
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    assert model.model.layers[0].self_attn.q_proj.weight.numel() == 0
    return get_peft_model(model, SaLoRAConfig(r=4, **{**options, **more}))


config = SaLoRAConfig(r=4, task_type="CAUSAL_LM", **options)
trained = SFTTrainer(model=demo, args=args, train_dataset=sum_rows(), peft_config=config)
trained.train()
trained.save_model(str(folder / "named"))
assert len(whole) == (rank == "0") and all(p.numel() for model in whole for p in model.parameters())
given().base_model.safety_module().save(folder / f"given-{rank}.safetensors")

messages = []
for more in ({"safety_data": [{"prompt": "Hello"}]}, {}):
    if not more:
        sharded.free_memory = lambda: 1000
    with pytest.raises(ValueError) as caught:
        given(**more)
    messages.append(str(caught.value))
(folder / f"messages-{rank}.json").write_text(json.dumps(messages))
trained.accelerator.end_training()
"""
)


@pytest.fixture(scope="module")
def in_the_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in_the_run")
    zero3 = str(EXAMPLES / "deepspeed-zero3.json")
    pytest.importorskip("trl")
    run_ranks(IN_THE_RUN, folder, str(DEMO), zero3, json.dumps(ANSWERED), **CPUS_AS_GPUS)
    return folder


def _check_equal(found: SafetyModule, expected: SafetyModule) -> None:
    for side, bases in expected.sides.items():
        assert all(torch.equal(found.sides[side].bases[name], basis) for name, basis in bases.bases.items())


@pytest.mark.compatibility(
    "Several processes", "DeepSpeed ZeRO stage 3 with SFTTrainer: the model answers the requests, in the run"
)
def test_sft_is_calibrated_in_the_run(in_the_run):
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    expected = calibrate(model, AutoTokenizer.from_pretrained(DEMO), **ANSWERED, calibration_cache=False)
    for name in ("named", "given-0.safetensors", "given-1.safetensors"):
        _check_equal(SafetyModule.load(in_the_run / name), expected)
    assert largest_share_inside(in_the_run / "named") <= 1e-5
    assert len([*(in_the_run / "cache-0").iterdir()]) == 1 and not (in_the_run / "cache-1").exists()


def test_all_ranks_say_what_the_first_one_cannot(in_the_run):
    first, second = (json.loads((in_the_run / f"messages-{rank}.json").read_text()) for rank in range(2))
    assert "salora calibrate" in first[1] and "free are 0.0 MB on the CPU" in first[1]
    assert all(
        text.startswith("On the first rank: ") and said in text for said, text in zip(first, second, strict=True)
    )


AXOLOTL = (
    AS_ON_GPUS
    + """
import json
import os

if __name__ == "__main__":  # what Axolotl starts imports this file
    from axolotl.cli.main import cli

    for port, file in zip(json.loads(sys.argv[2]), sys.argv[3:], strict=True):
        child = os.fork()  # a run leaves more behind than can be undone
        if not child:
            os.environ["MASTER_PORT"] = str(port)
            cli(["train", file, "--launcher", "python"], standalone_mode=False)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, file
"""
)


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory) -> Path:
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("Axolotl is not installed")
    folder = tmp_path_factory.mktemp("axolotl")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in sum_rows()]
    for name, of_file in {"rows": rows, "safety": refusal_rows()}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    config = yaml.safe_load((EXAMPLES / "axolotl-zero3.yml").read_text())
    config |= {
        "base_model": str(folder / "base"),
        "deepspeed": str(EXAMPLES / "deepspeed-zero3.json"),
        "datasets": [
            {
                "path": str(folder / "rows.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        **{"dataset_num_proc": 1, "sequence_len": 256, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
        **{"max_steps": 4, "save_steps": 2, "saves_per_epoch": None, "logging_steps": 1},
        **{"bf16": False, "fp16": False, "tf32": False},
    }
    block = {"safety_rank": 8}
    runs = {
        "in-the-run": {"salora": {**block, "safety_data": str(folder / "safety.jsonl")}},
        "before": {"salora": {**block, "safety_module": str(folder / "in-the-run" / "salora.safetensors")}},
        "resumed": {
            "salora": {**block, "safety_data": str(folder / "safety.jsonl")},
            "resume_from_checkpoint": str(folder / "in-the-run" / "checkpoint-2"),
        },
    }
    files = []
    for name, change in runs.items():
        files.append(folder / f"{name}.yml")
        changed = config | {"output_dir": str(folder / name)} | change
        files[-1].write_text(yaml.safe_dump({key: value for key, value in changed.items() if value is not None}))
    own = {"SALORA_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    ports = json.dumps([free_port() for _ in files])  # on which the ranks of each run meet
    run_ranks(AXOLOTL, folder, ports, *map(str, files), **CPUS_AS_GPUS, **own)
    return folder


@pytest.mark.compatibility(
    "Several processes", "DeepSpeed ZeRO stage 3 with Axolotl (examples/axolotl-zero3.yml): calibrated in the run"
)
def test_axolotl_is_calibrated_in_the_run(axolotl):
    rows = str(axolotl / "safety.jsonl")
    expected = calibrate(
        AutoModelForCausalLM.from_pretrained(axolotl / "base", dtype=torch.float32),
        AutoTokenizer.from_pretrained(axolotl / "base"),
        **{"safety_data": rows, "safety_rank": 8, "target_modules": OPTIONS["target_modules"]},
        calibration_cache=False,
    )
    _check_equal(SafetyModule.load(axolotl / "in-the-run"), expected)
    assert largest_share_inside(axolotl / "in-the-run") <= 1e-5
    assert largest_share_inside(axolotl / "in-the-run" / "checkpoint-2") <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "before",
            marks=pytest.mark.compatibility(
                "Several processes", "DeepSpeed ZeRO stage 3 with Axolotl (examples/axolotl-zero3.yml)"
            ),
        ),
        pytest.param("resumed", marks=pytest.mark.compatibility("Resuming", "Axolotl under DeepSpeed ZeRO stage 3")),
    ],
)
def test_axolotl_ends_with_the_same_weights(axolotl, name):
    expected = load_file(axolotl / "in-the-run" / "adapter_model.safetensors")
    found = load_file(axolotl / name / "adapter_model.safetensors")
    assert all(relative_difference(found[key], value) < 1e-5 for key, value in expected.items())
