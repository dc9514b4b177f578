"""
`make bench`: every performance claim as a ratio measured in one run.

Usage: ``python -m bench [NAME…] [--json] [--write]``.  Absolute times move with the machine;
ratios to a floor taken in the same run move by about a tenth.  Nothing here gates a test.
"""

import argparse
import compileall
import importlib
import json
import os
import sys
import time
from pathlib import Path

from bench import _page
from bench._harness import Result, table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bench", "ca", "issuer", "spiffe_core", "spiffe_wire", "tests", "workload_api")
BENCHES = {
    "startup": "start of the commands against bare python (target 19)",
    "issuance": "CSR in, certificate out, against one bare sign and verify (target 1)",
    "jwt": "JWT-SVIDs against the bare signature (target 5)",
    "issue_rpc": "signing over the wire, single and in batches (targets 3, 4)",
    "loop": "how late the event loop runs while heavy work is done (target 6)",
    "transport": "a call through the front door against plain grpcio",
    "delivery": "entry committed to SVID on an open stream",
    "pods": "a node with 500 pods, 20 starts a second; the check of a pod before signing",
    "peers": "what the check of a SPIFFE ID adds to a handshake and to a request",
    "streams": "1,000 open streams of the Workload API and of SDS, against plain grpcio",
    "agent_memory": "an agent with 100 entries and 50 streams (target 18)",
}


def main() -> int:
    """Run the benches named, or all; return 1 when one could not run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], help=", ".join(BENCHES))
    parser.add_argument("--json", action="store_true", help="one JSON list on the last line")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the figures into docs/reference/performance.md",
    )
    arguments = parser.parse_args()
    if arguments.write and arguments.names:
        parser.error("--write takes a whole run: name no bench")
    prepare()
    found: dict[str, list[Result]] = {}
    failed = False
    for name in arguments.names or BENCHES:
        started = time.monotonic()
        print(f"\n{name}: {BENCHES[name]}", file=sys.stderr)
        try:
            found[name] = importlib.import_module(f"bench.{name}").main()
        except Exception as error:  # noqa: BLE001 one bench that can't run must not hide the rest
            print(f"  could not run: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        print(table(found[name]))
        print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr)
    results = [one for some in found.values() for one in some]
    held = [one for one in results if one.target_text]
    short = [one for one in held if not one.met]
    if held:
        print(f"\n{len(held) - len(short)} of {len(held)} targets met")
    for one in short:
        print(f"  short: {one.name}: {one.value:.2f}, target {one.target_text}")
    if arguments.write and failed:
        print("nothing written: a bench could not run", file=sys.stderr)
    elif arguments.write:
        _page.write(found)
    if arguments.json:
        print(json.dumps([one.as_json() for one in results]))
    return 1 if failed else 0


def prepare() -> None:
    """See that processes start as they do from an installed wheel: with bytecode at hand."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Its handlers for a fork without exec cost time and a line of log for each process.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    for package in PACKAGES:
        compileall.compile_dir(ROOT / package, quiet=2)


if __name__ == "__main__":
    sys.exit(main())
