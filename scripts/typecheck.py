"""pyright with whatever Node.js there is: the system's, else the one from a wheel; never one fetched on the side."""

import os
import shutil
import subprocess
import sys


def main() -> int:
    use_system = "1" if shutil.which("node") else "0"
    environment = os.environ | {
        "PYRIGHT_PYTHON_GLOBAL_NODE": use_system,
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
        "PYRIGHT_PYTHON_PYLANCE_VERSION": "",
    }
    return subprocess.call([sys.executable, "-m", "pyright", *sys.argv[1:]], env=environment)


if __name__ == "__main__":
    sys.exit(main())
