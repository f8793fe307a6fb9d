"""Two processes: every rank ends with the same factors and bases, whatever its own batch."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
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
    r=4, safety_rank=8, input_safety_rank=4, task_rank=8, safety_data=token_rows(16), task_type="CAUSAL_LM",
    target_modules=["q_proj", "v_proj"],
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


def test_two_ranks_end_with_the_same_bits(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{PROGRAM}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([*launcher, str(program)], check=True, timeout=600)
