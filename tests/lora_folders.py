"""Small peft adapters on a random Llama, written by peft itself, for the tests of merging."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_base(folder):
    """A random Llama of two layers, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_adapter(folder, base, seed, **options):
    """A LoRA adapter with random factors, as peft saves it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    model = get_peft_model(open_base(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def open_base(folder, **options):
    """The base as plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def with_adapters(base, *folders):
    """peft's model with adapters named 0, 1, ..."""
    model = PeftModel.from_pretrained(open_base(base), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    return model


def deltas(model, adapter="0"):
    """peft's own s B A of every matrix that an adapter has."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and adapter in layer.lora_A
    }


@torch.no_grad()
def logits(model):
    """Of one fixed text."""
    return model.eval()(input_ids=torch.arange(24).view(2, 12) % 64).logits


@torch.no_grad()
def dense(base, changes):
    """The base with matrices changed by hand."""
    model = open_base(base)
    for name, change in changes.items():
        weight = model.get_submodule(name).weight
        weight += change.to(weight.dtype)
    return model
