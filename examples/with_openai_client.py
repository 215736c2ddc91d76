"""The same job through OpenAI's own client. Reads OPENAI_BASE_URL and OPENAI_API_KEY: eval "$(tunery status --env)"."""

import sys
import time
from pathlib import Path

from openai import OpenAI

here = Path(__file__).parent
client = OpenAI()

train = client.files.create(file=here / "train.jsonl", purpose="fine-tune")
valid = client.files.create(file=here / "validation.jsonl", purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model="smollm2-135m-instruct",
    training_file=train.id,
    validation_file=valid.id,
    suffix="from-openai-client",
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 5}}},
    extra_body={"tunery": {"training": {"max_length": 128}}},  # what OpenAI's API has no word for
)
sys.stdout.write(f"{job.id}\n")

seen: set[str] = set()
while True:
    job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
        if event.id not in seen:
            seen.add(event.id)
            sys.stdout.write(f"  {event.message}\n")
    if job.status in ("succeeded", "failed", "cancelled"):
        break
    time.sleep(2)
sys.stdout.write(f"{job.status}: {job.fine_tuned_model or job.error}\n")
