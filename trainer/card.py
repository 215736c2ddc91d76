"""The model card of a published adapter: what a hub shows, and how to load it."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trainer import export
from tunery.contracts.spec import TrainingSpec

NAMES = {
    "eval/loss": "Held-out loss",
    "eval/mean_token_accuracy": "Held-out token accuracy",
    "eval/exact_match": "Held-out exact match",
}


def render(spec: TrainingSpec, facts: dict[str, Any]) -> str:
    """`README.md`: metadata as a hub reads it, then prose for people."""
    name, base = spec.lineage.model_name, spec.base
    data = ModelCardData(
        model_name=name,
        base_model=base.hub_id,
        library_name="peft",
        license=base.license,
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl", "tunery", f"base_model:adapter:{base.hub_id}"],
        eval_results=_results(facts["after"]) or None,
        ignore_metadata_errors=True,
        base_model_relation="adapter",
    )
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", _about(spec, facts), _table(facts), _loading(spec)]
    return "\n".join(part for part in parts if part)


def _results(after: dict[str, float]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="private",
            dataset_name="held-out rows",
            dataset_split="validation",
            metric_type=key.removeprefix("eval/"),
            metric_name=NAMES[key],
            metric_value=round(value, 6),
        )
        for key, value in after.items()
        if key in NAMES
    ]


def _about(spec: TrainingSpec, facts: dict[str, Any]) -> str:
    base, lora, training = spec.base, spec.recipe.adapter, spec.recipe.training
    return (
        f"A LoRA adapter for [{base.hub_id}](https://huggingface.co/{base.hub_id}), revision `{base.revision}`.\n"
        f"The weights it was trained on came from `{base.source}`.\n\n"
        f"Rank {lora.r}, alpha {lora.lora_alpha:g}, {facts['steps']} steps of "
        f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} rows, learning rate "
        f"{training.learning_rate:g}, seed {training.seed}; {facts['tokens']:,} tokens on {facts['device']} in "
        f"{facts['precision']}. `tunery.json` holds the whole recipe, the versions and the hashes.\n"
    )


def _table(facts: dict[str, Any]) -> str:
    before, after = facts["before"], facts["after"]
    rows = [
        f"| {NAMES[key]} | {f'{before[key]:.4f}' if key in before else '-'} | {after[key]:.4f} |"
        for key in NAMES
        if key in after
    ]
    return "\n".join(["| | base | with adapter |", "|---|---|---|", *rows, ""]) if rows else ""


def _loading(spec: TrainingSpec) -> str:
    hub_id, name = spec.base.hub_id, spec.lineage.model_name
    lines = [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{hub_id}", revision="{spec.base.revision}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    if not export.vllm_compatible(spec.recipe.adapter):
        return "\n".join([*lines, "vLLM does not serve this kind of adapter (DoRA, biases or whole modules).", ""])
    flags = " ".join(["--enable-lora", *export.vllm_flags(spec.recipe.adapter)])
    command = f"vllm serve {hub_id} {flags} --lora-modules {name}=path/to/this/folder"
    return "\n".join([*lines, "```sh", command, "```", ""])
