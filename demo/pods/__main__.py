"""
``make demo-pods``: ``python -m demo.pods [--json]``.

Pods in real containers of an engine of its own, and a stand-in for the API server of their
cluster; all else is real.  Exit code 0 when every step came out as promised; ``--json`` prints
the facts as one JSON object on the last line.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import time

from demo.player import PlayerError
from demo.pods.story import NODES, Facts, Story
from demo.screen import TextScreen
from spiffe_core.errors import SpiffeError
from tests.support.containers import Engine, EngineError, why_not
from tests.support.podstack import a_pod_stack


async def play(engine: Engine, screen: TextScreen) -> Facts:
    """Run cluster, server and agents, and tell the story."""
    async with a_pod_stack(NODES) as stack:
        return await Story(engine, stack, screen).tell()


def table(facts: Facts) -> list[str]:
    """What was measured, for people."""
    rows = [
        *(
            (f"{name}: from asking to its SVID", one["connect_to_svid_ms"])
            for name, one in facts.pods.items()
        ),
        ("mutual TLS from pod to pod", facts.mtls["ms"]),
        ("label lost: identity gone from the open stream", facts.relabelled["lost_ms"]),
        ("label back: identity back (when it asks again)", facts.relabelled["back_ms"]),
        ("pod deleted: its open stream ended", facts.recreated["old_stream_ended_ms"]),
        ("pod of the same name: from asking to its SVID",
         facts.recreated["new_connect_to_svid_ms"]),
        ("stolen key, pod of another node: refused", facts.stolen["ms"]),
    ]  # fmt: skip
    return [f"{what:<56}{ms:>10.1f} ms" for what, ms in rows]


def main() -> int:
    """Play, and say how it ended."""
    arguments = argparse.ArgumentParser(prog="python -m demo.pods", description=__doc__)
    arguments.add_argument("--json", action="store_true", help="the facts, on the last line")
    as_json = arguments.parse_args().json
    screen = TextScreen()
    if reason := why_not():
        screen.bad(f"this demo runs real containers: it {reason}")
        return 1
    began = time.monotonic()
    screen.title("spiffe-issuer: identity by pod (real containers, a stand-in API server)")
    try:
        with Engine() as engine:
            facts = asyncio.run(play(engine, screen))
    except (PlayerError, EngineError, SpiffeError, AssertionError, OSError) as error:
        screen.bad(f"the demo could not go on: {error}")
        return 1
    except KeyboardInterrupt:
        screen.bad("stopped; everything it started has ended")
        return 130
    screen.step("What it took")
    for row in table(facts):
        screen.line(row)
    screen.good(f"Done in {time.monotonic() - began:.0f} s; everything it started has ended.")
    if as_json:
        print(json.dumps(dataclasses.asdict(facts)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
