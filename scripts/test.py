"""`make test`: every test, in two processes. The state machine waits more than it works: its ten minutes pass beside
the rest, with servers of its own. Options are pytest's, for both."""

import subprocess
import sys
import tempfile

BESIDE = "tests/chaos/test_machine.py"


def main() -> int:
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
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
