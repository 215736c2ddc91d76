"""`make test`: every test, in two processes. The state machine waits more than it works: its ten minutes pass beside
the rest, with servers of its own. It takes no options: some of the tests are run with `python -m pytest PATH`."""

import subprocess
import sys
import tempfile

BESIDE = "tests/chaos/test_machine.py"


def main() -> int:
    if sys.argv[1:]:
        sys.stderr.write(
            "scripts/test.py runs every test and takes no options; for some of them: python -m pytest PATH\n"
        )
        return 2
    pytest = [sys.executable, "-m", "pytest"]
    with tempfile.TemporaryFile() as told:
        beside = subprocess.Popen([*pytest, BESIDE], stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT)
        try:
            code = subprocess.call([*pytest, f"--ignore={BESIDE}"])
            code = beside.wait() or code
        finally:
            beside.terminate()
            beside.wait()
        told.seek(0)
        sys.stdout.write(f"\n{BESIDE}:\n{told.read().decode(errors='replace')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
