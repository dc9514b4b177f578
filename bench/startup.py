"""
Target 19: what the commands cost to start, as a multiple of bare python in the same run.

Measured in the CPU time of the processes, because a start waits for nothing; with bytecode
compiled beforehand, as an installed wheel has it.
"""

import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

from bench._harness import Result, alternate

PYTHON = sys.executable
AGENT = "import workload_api.agent.app"
SERVER = "import issuer.app"
OURS = {"ca", "issuer", "spiffe_core", "spiffe_wire", "workload_api"}


def start(*arguments: str) -> None:
    """Run Python to its end."""
    subprocess.run([PYTHON, *arguments], check=True, stdout=subprocess.DEVNULL)


def children_cpu() -> float:
    """CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def who_costs_most(code: str) -> str:
    """The packages that take most of *code*, by ``-X importtime``, as shares of its imports."""
    ran = subprocess.run(
        [PYTHON, "-X", "importtime", "-c", code], check=True, capture_output=True, text=True
    )
    spent: Counter[str] = Counter()
    for line in ran.stderr.splitlines():
        own, _, rest = line.removeprefix("import time:").partition("|")
        if own.strip().isdecimal():
            package = rest.partition("|")[2].strip().partition(".")[0]
            spent["ours" if package in OURS else package] += int(own)
    total = spent.total()
    return ", ".join(f"{name} {100 * one / total:.0f} %" for name, one in spent.most_common(6))


def main() -> list[Result]:
    """Start each several times, in turn, and compare medians."""
    took = alternate(
        {
            "bare": lambda: start("-c", ""),
            "issuer --help": lambda: start("-m", "issuer", "--help"),
            "issuer-agent --help": lambda: start("-m", "workload_api.agent", "--help"),
            "agent": lambda: start("-c", AGENT),
            "server": lambda: start("-c", SERVER),
        },
        rounds=11,
        clock=children_cpu,
    )
    return [
        _result(took, "issuer --help", at_most=2.5),
        _result(took, "issuer-agent --help", at_most=2.5),
        _result(took, "agent", at_most=13, code=AGENT),
        _result(took, "server", at_most=40, code=SERVER),
    ]


def _result(took: Mapping[str, float], name: str, *, at_most: float, code: str = "") -> Result:
    ratio = took[name] / took["bare"]
    what = f"{name} imports" if code else name
    note = f"{took[name] * 1000:.0f} ms"
    if code and ratio > at_most:
        note += f"; most of it: {who_costs_most(code)}"
    return Result(f"{what} / bare python", ratio, at_most=at_most, note=note)
