"""
The reference page of the client library, made from its signatures and docstrings.

Read with `ast`, not imported: what an optional library would add or change stays out.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HEAD = """
# The client library

For programs that hold an identity of their own, and check whose program is at the other end.
How to use it: [Python services](../howto/python-service.md), [gRPC](../howto/grpc-service.md),
[tests](../howto/test-your-service.md). The extra `client`
(`pip install '/path/to/the/clone[client]'`) brings aiohttp, which `http_peers` alone needs.

Everything that makes a connection takes *material*: an `X509Source`, or anything else with
`identity`, `bundles` and `on_change`. Everything that accepts a peer takes *authorize*: one of
the functions of `spiffe_core.matching`, or one of your own that is given the peer's `SpiffeId`
and raises when it is not welcome. Errors are of the family `spiffe_core.errors.SpiffeError`.
"""

MODULES = (
    "workload_api/client/x509source.py",
    "workload_api/client/watching.py",
    "workload_api/client/bundlesource.py",
    "workload_api/client/jwtsource.py",
    "workload_api/client/client.py",
    "workload_api/client/ssl_context.py",
    "workload_api/client/http_peers.py",
    "workload_api/client/grpc_peers.py",
    "workload_api/client/jwt_auth.py",
    "spiffe_core/matching.py",
    "workload_api/client/testing.py",
    "workload_api/client/fake_authority.py",
    "workload_api/client/pytest_plugin.py",
)
HIDDEN = {
    "watching": {"Pauses", "Follower", "SystemClock", "Clock"},
    "client": {"joined"},
    "fake_authority": {"utc_now"},
}
"""Public names that serve our own modules alone."""


def lines() -> Iterator[str]:
    """Yield the page's lines."""
    yield HEAD.strip("\n")
    for path in MODULES:
        yield from module(ROOT / path)


def module(path: Path) -> Iterator[str]:
    """One module: what it says of itself, then its public names in the order of the file."""
    tree = ast.parse(path.read_text())
    name = str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".")
    yield from ("", f"## {name}", "", *said(tree))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or node.name in HIDDEN.get(path.stem, ()):
            continue
        if isinstance(node, ast.ClassDef):
            yield from a_class(node)
        else:
            yield from headed(node.name, signature(node), node)


def headed(name: str, made: str, node: ast.AST) -> Iterator[str]:
    """A heading that can be found, the whole signature below it, and what it does."""
    shown = ["", f"`{name}{made}`"] if made else []
    yield from ("", f"### {name}", *shown, "", *said(node))


def a_class(node: ast.ClassDef) -> Iterator[str]:
    """A class: how it is made, what it says of itself, its properties, fields and methods."""
    methods = [
        one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    made = next((signature(one) for one in methods if one.name == "__init__"), "")
    yield from headed(node.name, made or fields_of(node), node)
    for one in methods:
        if one.name.startswith("_"):
            continue
        is_property = any(ast.unparse(mark) == "property" for mark in one.decorator_list)
        returned = f" -> {ast.unparse(one.returns)}" if one.returns else ""
        shown = f"{one.name}{returned}" if is_property else f"{one.name}{signature(one)}"
        yield from ("", f"* `{shown}`", "", *(f"  {line}".rstrip() for line in said(one)))


def fields_of(node: ast.ClassDef) -> str:
    """What a dataclass is made with."""
    if not any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        return ""
    shown = []
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and not ast.unparse(one.target).startswith("_"):
            kind = ast.unparse(one.annotation)
            default = "" if one.value is None else f" = {value_of(one.value)}"
            shown.append(f"{ast.unparse(one.target)}: {kind}{default}".replace(" = ...", ""))
    return f"({', '.join(shown)})"


def value_of(node: ast.expr) -> str:
    """A default as text; that of a dataclass field is inside a call."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        found = [one.value for one in node.keywords if one.arg == "default"]
        return ast.unparse(found[0]) if found else "..."
    return ast.unparse(node)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The parameters without ``self``, and what is returned."""
    made = ast.arguments(
        posonlyargs=[one for one in node.args.posonlyargs if one.arg != "self"],
        args=[one for one in node.args.args if one.arg not in ("self", "cls")],
        vararg=node.args.vararg,
        kwonlyargs=node.args.kwonlyargs,
        kw_defaults=node.args.kw_defaults,
        kwarg=node.args.kwarg,
        defaults=node.args.defaults,
    )
    returned = "" if node.returns is None else ast.unparse(node.returns)
    if returned in ("", "None", "Self"):
        return f"({ast.unparse(made)})"
    # Those that yield are entered or iterated over, not awaited.
    is_awaited = isinstance(node, ast.AsyncFunctionDef) and "Iterator" not in returned
    return f"({ast.unparse(made)}) -> {'await ' if is_awaited else ''}{returned}"


def said(node: ast.AST) -> Iterator[str]:
    """The docstring as Markdown: what is raised becomes a list."""
    text = ast.get_docstring(node, clean=False) or ""  # type: ignore[arg-type]
    body, found, raised = inspect.cleandoc(text).partition("\nRaises:\n")
    yield from body.replace("``", "`").replace("::\n", ":\n").splitlines()
    if not found:
        return
    yield from ("", "Raises:", "")
    for line in inspect.cleandoc(raised).splitlines():
        if line and not line.startswith(" ") and ": " in line:
            name, _, why = line.partition(": ")
            yield f"* `{name}`: {why.replace('``', '`')}"
        elif line:
            yield f"  {line.strip().replace('``', '`')}"
        else:
            yield ""
