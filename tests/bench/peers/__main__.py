"""Makes the environments of the peers: `python -m tests.bench.peers [NAME …] [-- OPTION-OF-PIP …]`.

Each file *.txt in this directory becomes an environment of its own in `.peers/` (or LLMFT_PEERS). On a machine
without a GPU: `-- --extra-index-url https://download.pytorch.org/whl/cpu`, or `-- --find-links DIR` for wheels at hand.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from tests.bench.systems import ENVIRONMENTS


def main() -> None:
    arguments = sys.argv[1:]
    if "--help" in arguments:
        print(__doc__)
        return
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    files = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.txt"))}
    names, options = arguments[:cut] or list(files), arguments[cut + 1 :]
    for name in names:
        if name not in files:
            raise SystemExit(f"{name}: no such peer; there are {', '.join(files)}")
        venv.create(ENVIRONMENTS / name, with_pip=True)
        python = ENVIRONMENTS / name / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "-q", *options, "-r", str(files[name])], check=True)
        print(f"{name}: {ENVIRONMENTS / name}")


if __name__ == "__main__":
    main()
