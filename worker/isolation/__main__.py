"""`python -P -m worker.isolation`: what this host gives trainers, as one JSON object; for `tunery doctor`."""

import json
import os
import sys
import tempfile
from pathlib import Path

from tunery.unreadable import hide_from_same_user
from worker import inventory
from worker.isolation.host import OFF
from worker.isolation.probe import Found, Layer, Wanted, find
from worker.isolation.walls import Way


def main() -> int:
    hide_from_same_user()
    get = os.environ.get
    if get("TUNERY_TRAINER_ISOLATION") == "off":
        layer = Layer("every wall", False, "switched off", "unset TUNERY_TRAINER_ISOLATION")
        sys.stdout.write(json.dumps(Found(Way(), (layer,)).as_json() | OFF) + "\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="tunery-doctor-") as folder:
        wanted = Wanted(
            home=Path(folder),
            trainer_module=get("TUNERY_TRAINER_MODULE", "trainer"),
            uids=get("TUNERY_TRAINER_UIDS", "60800-60863"),
            cgroups=get("TUNERY_TRAINER_CGROUPS", ""),
            readable=get("TUNERY_TRAINER_READABLE", ""),
            hidden=get("TUNERY_TRAINER_HIDDEN", ""),
            cuda_minors=inventory.minors(),
        )
        sys.stdout.write(json.dumps(find(wanted).as_json()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
