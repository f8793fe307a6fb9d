"""Real architectures at tiny size, a byte-level tokenizer and data, for all tests."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from salora_plugins import SaLoRAConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the ChatML tokens."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    result = fast_tokenizer(backend)
    result.chat_template = CHAT_TEMPLATE
    return result


def fast_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """With the special tokens of these tests and without a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )


VOCABULARY = 3 + 256
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return _spread(LlamaForCausalLM(LlamaConfig(**{**_SIZES, **options})))


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """With biases on q, k and v."""
    torch.manual_seed(seed)
    return _spread(Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)))


def qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return _spread(Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16)))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """With Conv1D layers, and dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2
    )
    return _spread(GPT2LMHeadModel(config))


def mistral(seed: int = 0) -> MistralForCausalLM:
    """With a sliding window and grouped keys."""
    torch.manual_seed(seed)
    return _spread(MistralForCausalLM(MistralConfig(**{**_SIZES, "num_key_value_heads": 2}, sliding_window=8)))


def gemma3(seed: int = 0) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    return _spread(Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=8)))


def phi3(seed: int = 0) -> Phi3ForCausalLM:
    """With fused qkv_proj and gate_up_proj."""
    torch.manual_seed(seed)
    return _spread(Phi3ForCausalLM(Phi3Config(**_SIZES)))


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    """With experts in fused, three-dimensional parameters."""
    torch.manual_seed(seed)
    return _spread(MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)))


def qwen3_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    """With experts in fused, three-dimensional parameters."""
    torch.manual_seed(seed)
    options = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _spread(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **options)))


def mamba(seed: int = 0) -> MambaForCausalLM:
    """Of state space layers only."""
    torch.manual_seed(seed)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)
    return MambaForCausalLM(config).eval()


def jamba(seed: int = 0) -> JambaForCausalLM:
    """With state space and attention layers in turn."""
    torch.manual_seed(seed)
    options = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8}
    options["use_mamba_kernels"] = False  # older Transformers does not leave them out by itself on a CPU
    return JambaForCausalLM(JambaConfig(**_SIZES, **options)).eval()


def sequence_classifier(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return _spread(LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_labels=2)))


def token_classifier(seed: int = 0) -> LlamaForTokenClassification:
    torch.manual_seed(seed)
    return _spread(LlamaForTokenClassification(LlamaConfig(**_SIZES, num_labels=2)))


ARCHITECTURES = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "qwen2": (qwen2, ["q_proj", "v_proj"]),
    "qwen3": (qwen3, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights than a fresh model's, so that logits differ visibly between inputs and adapters; eval mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def token_rows(count: int, length: int = 20, prompt: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    """Already tokenized rows with a prompt and a response."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def salora_config(**options) -> SaLoRAConfig:
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "safety_rank": 8,
        "task_rank": 8,
        "init": "task",  # the start with the most parts
        "safety_data": token_rows(16),
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return SaLoRAConfig(**{**defaults, **options})


def token_batch(batch: int = 2, length: int = 12, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def refusal_rows(count: int = 16) -> list[dict]:
    """Requests with refusals, as a user's own safety data."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Please help me to do harm number {i}."},
                {"role": "assistant", "content": f"I'm sorry, but I can't help with that ({i})."},
            ]
        }
        for i in range(count)
    ]


def sum_rows(count: int = 24) -> Dataset:
    """A benign task as conversational prompt-completion rows."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {i} plus {i + 1}?"}],
                "completion": [{"role": "assistant", "content": f"It is {2 * i + 1}."}],
            }
            for i in range(count)
        ]
    )


def preference_rows(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}],
                "chosen": [{"role": "assistant", "content": f"It is {2 * i}."}],
                "rejected": [{"role": "assistant", "content": f"No idea about {i}."}],
            }
            for i in range(count)
        ]
    )


def with_training_kernels(model: nn.Module) -> nn.Module:
    """On some CPUs bitsandbytes repacks 4-bit weights for inference, in bf16, after which they cannot be trained."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def smallest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the largest principal angle between two subspaces."""
    return torch.linalg.svdvals(a.double().T @ b.double()).min().item()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()
