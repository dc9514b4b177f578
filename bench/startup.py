"""Target 19: what the commands cost to start, as a multiple of bare python in the same run."""

import subprocess
import sys

from bench._harness import Result, alternate

PYTHON = sys.executable


def main() -> list[Result]:
    """Start each several times, in turn, and compare medians."""

    def start(*arguments: str) -> None:
        subprocess.run([PYTHON, *arguments], check=True, stdout=subprocess.DEVNULL)

    medians = alternate(
        {
            "bare": lambda: start("-c", ""),
            "issuer --help": lambda: start("-m", "issuer", "--help"),
            "issuer-agent --help": lambda: start("-m", "workload_api.agent", "--help"),
            "agent imports": lambda: start("-c", "import workload_api.agent.app"),
            "server imports": lambda: start("-c", "import issuer.app"),
        },
        rounds=11,
    )
    bare = medians["bare"]
    return [
        Result("issuer --help / bare python", medians["issuer --help"] / bare, at_most=2.5),
        Result(
            "issuer-agent --help / bare python",
            medians["issuer-agent --help"] / bare,
            at_most=2.5,
        ),
        Result("agent imports / bare python", medians["agent imports"] / bare, at_most=13),
        Result("server imports / bare python", medians["server imports"] / bare, at_most=40),
    ]


if __name__ == "__main__":
    main()
