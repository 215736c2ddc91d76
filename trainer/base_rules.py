"""What may be part of a base model, and how a refusal is said."""

import json
from pathlib import Path

from tunery.contracts.events import EXIT_USER

WANTED = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE*",
)  # fmt: skip
UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"}


class Refused(Exception):
    """An import that cannot go on; `code` for programs, `fix` for the operator."""

    def __init__(self, code: str, message: str, fix: str, *, exit_code: int = EXIT_USER) -> None:
        super().__init__(message)
        self.code, self.message, self.fix, self.exit_code = code, message, fix, exit_code


def refuse_unsafe(folder: Path) -> None:
    """Refuse pickled weights, Python files and configs that ask for remote code.

    Raises:
        Refused: something in `folder` could run code when loaded, or nothing in it is safetensors.
    """
    unsafe = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in UNSAFE_SUFFIXES)
    if unsafe:
        raise Refused(
            "unsafe_files", f"Files that could run code when loaded: {', '.join(unsafe[:5])}",
            "Convert the weights to safetensors and remove these files.",
        )  # fmt: skip
    if not list(folder.glob("*.safetensors")):
        raise Refused("no_safetensors", "No *.safetensors file in the model", "Use a model published as safetensors.")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists() and "auto_map" in json.loads(file.read_text()):
            raise Refused(
                "remote_code", f"{name} has an auto_map: the model wants its own code to be run",
                "Use a model that transformers supports by itself.",
            )  # fmt: skip
    if not (folder / "config.json").exists():
        raise Refused("no_config", "No config.json in the model", "Point at a folder in the Hugging Face layout.")
