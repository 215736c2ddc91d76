"""The base model in memory, its adapter, and the precision and memory choices that go with the device."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from trainer.failures import TrainingFailed
from tunery.contracts.spec import LoraSpec, TrainingSpec
from tunery.states import FailureCode

LISTED_MODULES = 40
CHECKPOINTING_SHARE = 0.6
"""Recompute activations when they would take more than this share of the free GPU memory."""


def pick_device() -> torch.device:
    """The one GPU that the worker made visible, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """A device as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def pick_precision(asked: str, device: torch.device) -> str:
    """`bf16` or `fp32`. `auto` is bf16 where a GPU has it, and fp32 on a CPU."""
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def load_tokenizer(path: str) -> Any:
    """The base model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(path: str, device: torch.device, precision: str) -> Any:
    """The base model's weights, from safetensors only."""
    if "auto_map" in AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict():
        raise TrainingFailed(FailureCode.INVALID_SPEC, "The base model asks for code of its own, which is never run.")
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        attn_implementation="sdpa",
    )
    return model.to(device)


def generation_config(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that ends at every token which ends a turn for this model."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def add_adapter(model: Any, spec: TrainingSpec) -> PeftModel:
    """Put a fresh float32 LoRA adapter over a base model; the seed alone decides its first values.

    Raises:
        TrainingFailed: a target module that the model does not have.
    """
    lora = spec.recipe.adapter
    check_targets(model, lora)
    set_seed(spec.recipe.training.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # biases and whole saved modules too: bf16 loses small updates
    return adapted


def check_targets(model: Any, lora: LoraSpec) -> None:
    """Refuse module names that match nothing, naming those that would.

    Raises:
        TrainingFailed: INVALID_TARGETS.
    """
    head = model.get_output_embeddings()
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not isinstance(lora.target_modules, str):
        unknown = _unmatched(lora.target_modules, linears)
        if unknown:
            raise TrainingFailed(
                FailureCode.INVALID_TARGETS,
                f"target_modules: the base model has no linear module {_quoted(unknown)}. "
                f"Valid names: all-linear, {', '.join(_leaves(linears)[:LISTED_MODULES])}.",
            )
    modules = {name for name, module in model.named_modules() if name and module is not head}
    unknown = _unmatched(lora.modules_to_save or (), modules)
    if unknown:
        # The output head is refused too: the loss reads its weight directly, and it is often tied to the embedding.
        raise TrainingFailed(
            FailureCode.INVALID_TARGETS,
            f"modules_to_save: the base model has no module {_quoted(unknown)} that can be trained whole. "
            f"Valid names: {', '.join(_leaves(modules)[:LISTED_MODULES])}.",
        )


def needs_checkpointing(config: Any, tokens: int, precision: str, device: torch.device) -> bool:
    """Whether to recompute activations: only on a GPU that could not hold them (it costs a third of the speed).

    `tokens` is the size of the largest micro-batch. Eager LoRA keeps about 12 hidden and 4 intermediate vectors a
    token and layer.
    """
    if device.type != "cuda":
        return False
    text = config.get_text_config()
    width = 12 * text.hidden_size + 4 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    needed = tokens * text.num_hidden_layers * width * (2 if precision == "bf16" else 4)
    free, _ = torch.cuda.mem_get_info(device)
    return needed > CHECKPOINTING_SHARE * free


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all of them."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def base_facts(path: str) -> dict[str, Any]:
    """What `base.json` beside the weights says, without its list of files; empty where there is none."""
    file = Path(path) / "base.json"
    if not file.exists():
        return {}
    facts = json.loads(file.read_text())
    return {key: facts[key] for key in ("source", "source_sha256", "revision", "license") if key in facts}


def _whole(value: float) -> Any:
    """32 rather than 32.0: PEFT calls it an int, and servers may check."""
    return int(value) if value == int(value) else value


def _unmatched(names: Iterable[str], modules: set[str]) -> list[str]:
    return [name for name in names if not any(m == name or m.endswith(f".{name}") for m in modules)]


def _leaves(modules: set[str]) -> list[str]:
    return sorted({leaf for name in modules if not (leaf := name.rsplit(".", 1)[-1]).isdigit()})


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
