"""
`make bench`: every performance claim as a ratio measured in one run.

Usage: ``python -m bench [NAME…] [--json]``.  Absolute times move with the machine; ratios
to a floor taken in the same run move by about a tenth.  Nothing here gates a test.
"""

import argparse
import importlib
import json
import sys
import time

from bench._harness import Result, table

BENCHES = {
    "startup": "start of the commands against bare python (target 19)",
    "issuance": "CSR in, certificate out, against one bare sign and verify (targets 1, 2)",
    "jwt": "JWT-SVIDs against the bare signature (target 5)",
    "issue_rpc": "signing over the wire, single and in batches (target 3)",
    "loop": "how late the event loop runs while heavy work is done (target 6)",
    "transport": "a call through the front door against plain grpcio",
    "delivery": "entry committed to SVID on an open stream",
    "agent_memory": "an agent with 100 entries and 50 streams (target 18)",
}


def main() -> int:
    """Run the benches named, or all; return 1 when one could not run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], help=", ".join(BENCHES))
    parser.add_argument("--json", action="store_true", help="one JSON list on the last line")
    arguments = parser.parse_args()
    results: list[Result] = []
    failed = False
    for name in arguments.names or BENCHES:
        started = time.monotonic()
        print(f"\n{name}: {BENCHES[name]}", file=sys.stderr)
        try:
            found = importlib.import_module(f"bench.{name}").main()
        except Exception as error:  # noqa: BLE001 one bench that can't run must not hide the rest
            print(f"  could not run: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        results += found
        print(table(found))
        print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr)
    short = [one for one in results if not one.met]
    print(f"\n{len(results) - len(short)} of {len(results)} targets met" if results else "")
    for one in short:
        print(f"  short: {one.name}: {one.value:.2f}, target {one.target_text}")
    if arguments.json:
        print(json.dumps([one.as_json() for one in results]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
