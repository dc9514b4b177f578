"""Puts the figures of a run into docs/reference/performance.md, so that nobody types any."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench._harness import Result

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "performance.md"
BEGIN = "<!-- figures: written by `python -m bench --write` -->"
END = "<!-- /figures -->"


def write(found: Mapping[str, Sequence[Result]], page: Path = PAGE) -> None:
    """
    Replace what stands between the two comments of *page*.

    Raises:
        ValueError: the comments are not there.
    """
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for figures: {BEGIN} … {END}")
    page.write_text(f"{head}{BEGIN}\n\n{figures(found)}\n{END}{tail}")


def figures(found: Mapping[str, Sequence[Result]]) -> str:
    """The results as Markdown: when, where, and a table for each bench."""
    lines = [f"Taken {datetime.now(UTC):%Y-%m-%d} on {machine()}.", ""]
    for name, results in found.items():
        lines += [f"### {name}", "", "| what | figure | target | |", "|---|---|---|---|"]
        for one in results:
            figure = f"{one.value:.2f} {one.unit}".strip()
            verdict = "" if not one.target_text else "met" if one.met else "**short**"
            verdict = "; ".join(part for part in (verdict, one.note) if part)
            lines.append(f"| {one.name} | {figure} | {one.target_text} | {verdict} |")
        lines.append("")
    return "\n".join(lines)


def machine() -> str:
    """What the figures depend on, without the machine's name."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), "
        f"{pages / 2**30:.0f} GiB, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}; load of the machine "
        f"at the end {os.getloadavg()[1]:.1f}"
    )
