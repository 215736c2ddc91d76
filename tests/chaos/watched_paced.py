"""Tunery's own trainer under the device's witness, ten steps a second at most: a long job leaves room for others."""

import time
from typing import Any

from tests.chaos import witness

PAUSE_S = 0.1


def _pace() -> None:
    from trainer.callbacks import Loop

    begin = Loop.on_step_begin

    def paced(self: Loop, *arguments: Any, **more: Any) -> None:
        time.sleep(PAUSE_S)
        begin(self, *arguments, **more)

    Loop.on_step_begin = paced


if __name__ == "__main__":
    witness.run("trainer", _pace)
