"""A run of the command line on a terminal of its own, and Ctrl-C typed there.

`python -m tests.support.terminal RECIPE RUN_DIR` prints, as one JSON line per run, what the terminal showed, the exit
code, and how long the end took. Everything is imported once; each run is a fork on a new pseudo-terminal. Steps are
made to last a second, so that both of two presses fall into one.
"""

from __future__ import annotations

import json
import os
import pty
import sys
import time
from typing import Any

CTRL_C = b"\x03"


def run(arguments: list[str], begun: bytes, presses: int) -> dict[str, object]:
    """Presses Ctrl-C so many times once the terminal has shown `begun`."""
    pid, terminal = pty.fork()
    if pid == 0:
        from lora_dpo import cli, step

        real = step.accumulate

        def slow(*more: Any) -> Any:
            time.sleep(1)
            return real(*more)

        step.accumulate = slow
        try:
            cli.main(arguments)
        except SystemExit as error:
            sys.stderr.flush()
            os._exit(int(error.code or 0))
    shown, pressed_at, pressed = b"", 0.0, 0
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if begun in shown and not pressed:
            for _ in range(presses):
                os.write(terminal, CTRL_C)
                time.sleep(0.2)
            pressed, pressed_at = presses, time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"shown": shown.decode("utf-8", "replace"), "code": code, "seconds": time.monotonic() - pressed_at}


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    import lora_dpo.build
    import lora_dpo.data.pickapic
    import lora_dpo.families.stable_diffusion
    import lora_dpo.methods.pairs  # noqa: F401

    recipe, run_dir = sys.argv[1:]
    arguments = ["train", recipe, "train.steps=100000", "train.save_every_steps=100000", "--run-dir", run_dir]
    for presses in (1, 2):
        print(json.dumps(run(arguments, b"accuracy", presses)), flush=True)


if __name__ == "__main__":
    main()
