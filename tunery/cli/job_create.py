"""`jobs create`: from flags, files and a recipe to one request."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config, files, job_follow, refs
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import Json, Quiet
from tunery.cli.show import size
from tunery.cli.terminal import clean, data, done, json_out, say

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.shapes import Job

SECTIONS = ("adapter", "training", "evaluation", "resources", "scheduling")


def register(app: typer.Typer) -> None:
    app.command("create")(create)


def create(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="A base model, or a tuned one to go on from.")
    ],
    training: Annotated[str, typer.Option("--training", "-t", metavar="FILE|ID", help="A local JSONL file or an id.")],
    validation: Annotated[
        str | None,
        typer.Option("--validation", "-v", metavar="FILE|ID", help="Held-out rows, for measuring."),
    ] = None,
    suffix: Annotated[str | None, typer.Option(metavar="NAME", help="A part of the result's name.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Else one is drawn and told.")] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, help="Examples per optimiser step.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate, e.g. 2e-4.")] = None,
    lr_multiplier: Annotated[
        float | None, typer.Option(metavar="X", help="Of the default learning rate (OpenAI's).")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", metavar="N", min=1, help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(metavar="X", help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(metavar="X", min=0, max=1, help="LoRA dropout.")] = None,
    target_modules: Annotated[str | None, typer.Option(metavar="A,B", help="all-linear, or module names.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", min=16, help="Tokens per example, at most.")] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many steps.")] = None,
    eval_steps: Annotated[int | None, typer.Option(metavar="N", min=0, help="Evaluate every so many steps.")] = None,
    save_steps: Annotated[int | None, typer.Option(metavar="N", min=0, help="Checkpoint every so many steps.")] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", min=0, max=20, help="Held-out prompts to answer.")] = None,
    exact_match: Annotated[
        bool | None, typer.Option("--exact-match/--no-exact-match", help="Count right answers.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Settings; flags go over it.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Repeatable.")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="On one node.")] = None,
    gpu_class: Annotated[str | None, typer.Option(metavar="NAME", help="Only on such GPUs, e.g. h100-80gb.")] = None,
    node_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only on nodes that have it. Repeatable.")
    ] = None,
    shareable: Annotated[
        bool | None, typer.Option("--shareable/--exclusive", help="May share its GPU with your project's others.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(metavar="N", min=-100, max=100, help="Among your project's jobs; higher first.")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(metavar="2h30m", help="How long it may hold its GPUs.")] = None,
    preemptible: Annotated[
        bool | None, typer.Option("--preemptible/--no-preemption", help="May be stopped at a checkpoint for others.")
    ] = None,
    urgent: Annotated[bool, typer.Option("--urgent", help="Before every project's jobs; operators only.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended; exit 3 or 10 if not well.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="As --wait, with live progress.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return at once (the default).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request; upload and submit nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start a fine-tuning job. A local file is uploaded first."""
    given = dict(locals())
    if wait + watch + detach > 1:
        raise typer.BadParameter("choose one of --wait, --watch and --detach")
    body = request_of(given)
    local = _local_files(training, validation)
    if dry_run:
        json_out(body)
        for path in local.values():
            say(f"would upload {path} ({size(path.stat().st_size)}) first")
        say("dry run: nothing was uploaded or submitted")
        return
    api = config.client()
    job = _submit(api, body, local)
    _follow_or_leave(api, job, wait=wait, watch=watch, as_json=as_json, quiet=quiet)


def request_of(given: dict[str, Any]) -> dict[str, Any]:
    """The API's request, from the options of `create`; files are still named as they were given."""
    settings = _sections(given["recipe"])
    _overlay(
        settings,
        "adapter",
        r=given["r"],
        lora_alpha=given["alpha"],
        lora_dropout=given["dropout"],
        target_modules=_modules(given["target_modules"]),
    )
    _overlay(settings, "training", max_length=given["max_length"], max_steps=given["max_steps"])
    _overlay(settings, "training", eval_steps=given["eval_steps"], save_steps=given["save_steps"])
    _overlay(settings, "evaluation", samples=given["samples"], exact_match=given["exact_match"])
    labels = pairs(given["node_label"], "--node-label") if given["node_label"] else None
    _overlay(
        settings,
        "resources",
        gpus=given["gpus"],
        gpu_class=given["gpu_class"],
        node_labels=labels,
        shareable=given["shareable"],
    )
    _overlay(
        settings,
        "scheduling",
        priority=given["priority"],
        time_limit=given["time_limit"],
        preemptible=given["preemptible"],
    )
    _overlay(settings, "scheduling", urgent=given["urgent"] or None)
    body: dict[str, Any] = {
        "model": given["model"],
        "training_file": given["training"],
        "validation_file": given["validation"],
    }
    body |= {
        "suffix": given["suffix"],
        "seed": _seed(settings, given["seed"]),
        "metadata": pairs(given["metadata"] or []) or None,
    }
    body["method"] = _method(settings, given["epochs"], given["batch_size"], given["lr"], given["lr_multiplier"])
    body["tunery"] = {name: section for name, section in settings.items() if section} or None
    return {name: value for name, value in body.items() if value is not None}


def _submit(api: "Client", body: dict[str, Any], local: dict[str, Path]) -> "Job":
    """A job that is refused leaves no uploaded file behind."""
    from tunery.client.errors import APIError, TuneryError

    if local:
        api.model(body["model"])  # a name that does not exist should not leave an uploaded file behind
    uploaded: dict[Path, str] = {}
    for name in ("training_file", "validation_file"):
        if name in local:
            path = local[name]
            uploaded[path] = uploaded.get(path) or files.send(api, path)["id"]
            body[name] = uploaded[path]
        elif name in body:
            body[name] = refs.file(api, body[name])["id"]
    try:
        return api.create_job(body)
    except APIError as refused:
        if refused.status < 500:  # else it may have been accepted
            for sent in uploaded.values():
                with contextlib.suppress(TuneryError):
                    api.delete_file(sent)
        raise


def _follow_or_leave(api: "Client", job: "Job", *, wait: bool, watch: bool, as_json: bool, quiet: bool) -> None:
    if not as_json:
        data(job["id"])
    if wait or watch:
        ended = job_follow.follow(api, job["id"], live=watch, quiet=quiet)
        if as_json:
            json_out(ended)
        raise typer.Exit(job_follow.outcome(ended))
    if as_json:
        json_out(job)
    elif not quiet:
        done(f"submitted  {clean(job.get('model'))}")
        say(f"  watch  tunery jobs watch {job['id']}")
        say(f"  logs   tunery jobs logs -f {job['id']}")
        say(f"  stop   tunery jobs cancel {job['id']}")


def _local_files(training: str, validation: str | None) -> dict[str, Path]:
    """Both are looked at before either is sent."""
    found: dict[str, Path] = {}
    for name, ref in (("training_file", training), ("validation_file", validation)):
        if ref is None:
            continue
        path = Path(ref)
        looks_like_path = path.suffix or "/" in ref or "\\" in ref
        if path.exists() or looks_like_path:
            found[name] = files.local_file(path)
    return found


def _sections(recipe: Path | None) -> dict[str, dict[str, Any]]:
    """`--recipe`: the object that `jobs show --json` prints under `tunery.recipe`, or parts of it."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if recipe is None:
        return settings
    try:
        document = json.loads(recipe.read_text())
    except ValueError as error:
        raise _bad_recipe(recipe, f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _bad_recipe(recipe, "it has to be one JSON object")
    if document.pop("method", "supervised") != "supervised":
        raise _bad_recipe(recipe, 'method: only "supervised" is known')
    for name, section in document.items():
        if name not in SECTIONS or not isinstance(section, dict):
            raise _bad_recipe(recipe, f"{name}: expected one of {', '.join(SECTIONS)}, each an object")
        settings[name] = section
    return settings


def _bad_recipe(recipe: Path, why: str) -> Failure:
    return Failure(
        f"{recipe} is not a recipe",
        why=why,
        fix='For example: {"adapter": {"r": 16}, "training": {"learning_rate": 2e-4}}',
        code="invalid_recipe",
        exit_code=Exit.INVALID,
    )


def _overlay(settings: dict[str, dict[str, Any]], name: str, **flags: Any) -> None:
    settings[name] = {**settings[name], **{key: value for key, value in flags.items() if value is not None}}


def _method(
    settings: dict[str, dict[str, Any]],
    epochs: float | None,
    batch_size: int | None,
    lr: float | None,
    lr_multiplier: float | None,
) -> dict[str, Any] | None:
    """OpenAI's three settings go where OpenAI has them; a recipe's word for the same thing gives way."""
    if lr is not None and lr_multiplier is not None:
        raise typer.BadParameter("choose one of --lr and --lr-multiplier")
    asked: dict[str, Any] = {}
    training = settings["training"]
    if epochs is not None:
        training.pop("num_train_epochs", None)
        if epochs == int(epochs):
            asked["n_epochs"] = int(epochs)
        else:
            training["num_train_epochs"] = epochs  # OpenAI's is a whole number
    if batch_size is not None:
        training.pop("per_device_train_batch_size", None)
        training.pop("gradient_accumulation_steps", None)
        asked["batch_size"] = batch_size
    if lr is not None:
        training["learning_rate"] = lr
    if lr_multiplier is not None:
        training.pop("learning_rate", None)
        asked["learning_rate_multiplier"] = lr_multiplier
    return {"type": "supervised", "supervised": {"hyperparameters": asked}} if asked else None


def _seed(settings: dict[str, dict[str, Any]], seed: int | None) -> int | None:
    if seed is not None:
        settings["training"].pop("seed", None)
    return seed


def _modules(text: str | None) -> str | list[str] | None:
    if text is None or text == "all-linear":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def pairs(items: list[str], option: str = "--metadata") -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE", param_hint=option)
        found[key] = value
    return found
