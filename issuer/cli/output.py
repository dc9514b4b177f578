"""Text for people, JSON and YAML for programs."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any


def show(value: Any, style: str, text: str = "") -> None:
    """Print *value* for programs, or *text* for people."""
    if style == "json":
        print(json.dumps(value, indent=2))
    elif style == "yaml":
        import yaml

        print(yaml.safe_dump(value, sort_keys=False), end="")
    else:
        print(text)


def message(one: Any) -> Any:
    """Return a protobuf message as plain values, proto names and defaults included."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(
        one, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: with colour and fitted on a terminal, plain columns elsewhere."""
    if not sys.stdout.isatty():
        widths = [max(len(row[at]) for row in [titles, *rows]) for at in range(len(titles))]
        for row in [titles, *rows]:
            print(
                "  ".join(
                    f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
        return
    from rich.console import Console
    from rich.table import Table

    made = Table(*titles, box=None, header_style="bold cyan", pad_edge=False)
    for row in rows:
        made.add_row(*row)
    Console().print(made)


def spiffe_id(one: Any) -> str:
    """Return a ``SPIFFEID`` message as text."""
    return f"spiffe://{one.trust_domain}{one.path}"


def relative(seconds: int) -> str:
    """Return Unix *seconds* as a time from now; ``never`` for 0."""
    if not seconds:
        return "never"
    span = int(seconds - datetime.now(UTC).timestamp())
    amount, unit = abs(span), "s"
    for size, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if amount >= 2 * size:
            amount, unit = amount // size, name
            break
    return f"in {amount}{unit}" if span >= 0 else f"{amount}{unit} ago"
