"""Pin and hash the dependencies of pyproject.toml in requirements/ (`make requirements`)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Pinned and hashed from pyproject.toml by `make requirements`; do not edit.\n"


def main() -> int:
    """Write both sets; `run` is a part of `dev`, so its pins constrain it."""
    folder = ROOT / "requirements"
    compile_set(["--extra", "server"], folder / "run.txt", [])
    compile_set(
        ["--extra", "server", "--extra", "dev"],
        folder / "dev.txt",
        ["-c", str(folder / "run.txt")],
    )
    return 0


def compile_set(extras: list[str], output: Path, constraints: list[str]) -> None:
    """Resolve one set with hashes and no address of any registry."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "piptools",
            "compile",
            "--quiet",
            "--generate-hashes",
            "--no-emit-index-url",
            "--no-emit-trusted-host",
            "--no-emit-find-links",
            "--no-header",
            "--no-annotate",
            "--strip-extras",
            "--allow-unsafe",
            "--resolver=backtracking",
            *extras,
            *constraints,
            "--output-file",
            str(output),
            "pyproject.toml",
            "requirements/extra-run.in",
        ],
        cwd=ROOT,
        check=True,
    )
    output.write_text(HEAD + output.read_text())


if __name__ == "__main__":
    sys.exit(main())
