"""Complete, hashed, resumable states of a job. Nothing in one is pickled.

step-N/
  adapter_model.safetensors, adapter_config.json   the adapter, loadable by PEFT as it is
  optimizer.safetensors    Adam's moments, by parameter number and name
  rng.safetensors          torch's generators, CPU and CUDA
  trainer_state.json       the loop's position (Hugging Face's)
  state.json               ours: schedule, parameter groups, other generators, tokens, what it belongs to
  MANIFEST.json            sha256 and size of every other file
"""

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from trainer import manifest
from trainer.failures import TrainingFailed
from tunery import failpoints
from tunery.contracts.events import FileEntry
from tunery.contracts.spec import TrainingSpec
from tunery.states import FailureCode

MANIFEST = "MANIFEST.json"
CADENCE = {"logging_steps", "eval_steps", "save_steps", "save_interval_s"}


@dataclass(frozen=True)
class Progress:
    """What a resumed attempt must know and the loop does not: token count, and the base model's own scores."""

    step: int
    tokens: int
    before: dict[str, float]


def save(folder: Path, spec: TrainingSpec, trainer: Any, progress: Progress) -> list[FileEntry]:
    """Write `folder` whole or not at all; returns its files, the manifest last."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_adapter(temporary, trainer.model, spec)
    failpoints.reach("checkpoint.writing")
    optimizer = trainer.optimizer.state_dict()
    moments = {
        f"{number}.{name}": _plain(t) for number, state in optimizer["state"].items() for name, t in state.items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    save_file(_torch_generators(), temporary / "rng.safetensors")
    state = {
        "belongs_to": fingerprint(spec),
        "step": progress.step,
        "tokens": progress.tokens,
        "before": progress.before,
        "param_groups": optimizer["param_groups"],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "python_rng": random.getstate(),
        "numpy_rng": [part.tolist() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()],
    }
    (temporary / "state.json").write_text(json.dumps(state))
    trainer.state.save_to_json(str(temporary / "trainer_state.json"))
    files = manifest.entries_of(temporary)
    listing = {"step": progress.step, "files": [entry.model_dump() for entry in files]}
    (temporary / MANIFEST).write_text(json.dumps(listing, indent=1))
    files.append(manifest.entry_of(temporary, temporary / MANIFEST))
    manifest.publish(temporary, folder)
    return files


def verify(folder: Path, spec: TrainingSpec) -> Progress:
    """Check every byte against the manifest before anything is loaded, and that the checkpoint is this job's.

    Raises:
        TrainingFailed: CORRUPT_CHECKPOINT, or INVALID_SPEC for another job's checkpoint.
    """
    try:
        listed = [FileEntry.model_validate(entry) for entry in json.loads((folder / MANIFEST).read_text())["files"]]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingFailed(
            FailureCode.CORRUPT_CHECKPOINT, f"{folder.name}: no readable {MANIFEST}: {error}"
        ) from error
    found = {entry.name: entry for entry in manifest.entries_of(folder, without=[MANIFEST])}
    wrong = sorted({e.name for e in listed if found.get(e.name) != e} | (found.keys() - {e.name for e in listed}))
    if wrong:
        raise TrainingFailed(
            FailureCode.CORRUPT_CHECKPOINT, f"{folder.name} differs from its manifest in {', '.join(wrong)}."
        )
    state = _read_state(folder)
    if state["belongs_to"] != fingerprint(spec):
        raise TrainingFailed(
            FailureCode.INVALID_SPEC, f"{folder.name} belongs to another recipe, base model or training file."
        )
    return Progress(state["step"], state["tokens"], state["before"])


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Put a checkpoint's adapter weights into the model's adapter."""
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def load_optimizer(folder: Path, trainer: Any) -> None:
    """Put a checkpoint's moments and schedule into a trainer that has just made its optimizer."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    saved = _read_state(folder)
    groups = [{**group, "betas": tuple(group["betas"])} for group in saved["param_groups"]]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.lr_scheduler.load_state_dict(saved["lr_scheduler"])


def load_generators(folder: Path) -> None:
    """Put every random generator where it stood."""
    saved = _read_state(folder)
    version, words, gauss = saved["python_rng"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = saved["numpy_rng"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    tensors = load_file(folder / "rng.safetensors")
    torch.set_rng_state(tensors.pop("cpu"))
    if torch.cuda.is_available():
        for key, tensor in tensors.items():
            torch.cuda.set_rng_state(tensor, int(key.removeprefix("cuda.")))


def write_adapter(folder: Path, model: PeftModel, spec: TrainingSpec) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT, vLLM and SGLang read them."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {k: _plain(v) for k, v in weights.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    config = model.peft_config["default"].to_dict()
    targets = config["target_modules"]
    config |= {
        "base_model_name_or_path": spec.base.hub_id,  # never a path of this machine: servers compare it
        "revision": spec.base.revision,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "inference_mode": True,
    }
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def fingerprint(spec: TrainingSpec) -> str:
    """What a checkpoint depends on: how often we look at the model may change between two attempts, the rest not."""
    parts = [
        spec.base.hub_id,
        spec.base.revision,
        spec.data.train_sha256,
        spec.recipe.method,
        spec.recipe.adapter.model_dump(mode="json"),
        spec.recipe.training.model_dump(mode="json", exclude=CADENCE),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory


def _torch_generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
