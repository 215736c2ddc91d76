"""The published folder: an adapter as PEFT, vLLM and SGLang read it, with its card and its history. No pickles."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer import card, checkpoints, manifest
from tunery import __version__
from tunery.contracts.events import FileEntry
from tunery.contracts.spec import LoraSpec, TrainingSpec

SUMS = "SHA256SUMS"
VLLM_DEFAULT_RANK = 16
LIBRARIES = ("torch", "transformers", "trl", "peft", "tokenizers", "safetensors", "accelerate")


def versions() -> dict[str, str]:
    """The versions that made a result what it is."""
    return {"python": platform.python_version(), "tunery": __version__, **{name: version(name) for name in LIBRARIES}}


def export(spec: TrainingSpec, model: Any, tokenizer: Any, facts: dict[str, Any]) -> list[FileEntry]:
    """Write `spec.output` whole or not at all; returns its files, `SHA256SUMS` last.

    `facts` are the measured ones: device, precision, steps, tokens, metrics.
    """
    output = Path(spec.output)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    checkpoints.write_adapter(temporary, model, spec)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card.render(spec, facts))
    (temporary / "tunery.json").write_text(json.dumps(history(spec, facts), indent=2) + "\n")
    files = manifest.entries_of(temporary)
    (temporary / SUMS).write_text("".join(f"{entry.sha256}  {entry.name}\n" for entry in files))
    files.append(manifest.entry_of(temporary, temporary / SUMS))
    if output.is_dir():
        output.rmdir()  # an empty folder made for us; a full one is somebody's, and this raises
    manifest.publish(temporary, output)
    return files


def history(spec: TrainingSpec, facts: dict[str, Any]) -> dict[str, Any]:
    """`tunery.json`: what was asked for, on what, by which versions, and what came out."""
    return {
        "format": 1,
        "lineage": spec.lineage.model_dump(mode="json"),
        "base": spec.base.model_dump(mode="json", exclude={"path"}),
        "data": spec.data.model_dump(mode="json", include={"train_sha256", "validation_sha256"}),
        "recipe": spec.recipe.model_dump(mode="json"),
        "seed": spec.recipe.training.seed,
        "versions": versions(),
        **facts,
        "vllm_compatible": vllm_compatible(spec.recipe.adapter),
        "vllm_flags": vllm_flags(spec.recipe.adapter),
    }


def vllm_compatible(lora: LoraSpec) -> bool:
    """Whether vLLM can serve the adapter beside others on one base."""
    return not lora.use_dora and lora.bias == "none" and not lora.modules_to_save


def vllm_flags(lora: LoraSpec) -> list[str]:
    """What `vllm serve` needs besides `--enable-lora`: it refuses ranks above 16 unless told."""
    if not vllm_compatible(lora) or lora.r <= VLLM_DEFAULT_RANK:
        return []
    return ["--max-lora-rank", str(next((rank for rank in (32, 64, 128, 256, 320, 512) if rank >= lora.r), lora.r))]
