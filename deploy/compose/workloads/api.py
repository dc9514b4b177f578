"""
A service that says who called it.

It speaks plain HTTP on loopback, to the Envoy beside it.  That one lets in only whom its rules
name, and says who it is in the header x-forwarded-client-cert, which it takes from nobody else.
"""

import signal
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PLACE = ("127.0.0.1", 8000)


class Handler(BaseHTTPRequestHandler):
    """Greets the caller by its SPIFFE ID."""

    def do_GET(self) -> None:
        """Answer a request; `/health` is asked by the engine, and not through Envoy."""
        found = fields(self.headers.get("x-forwarded-client-cert", ""))
        caller = found.get("URI", "nobody that Envoy knows")
        answer = f"hello {caller}, certificate {found.get('Hash', '-')[:12]}"
        if self.path != "/health":
            print(f"{caller} asked for {self.path}")  # noqa: T201 a container's log
        body = f"{answer}\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Leave the lines to `do_GET`."""


def fields(header: str) -> dict[str, str]:
    """Of ``By=spiffe://…;Hash=…;URI=spiffe://…`` the parts."""
    parts = (one.partition("=") for one in header.split(";"))
    return {name: value for name, _, value in parts}


def main(arguments: list[str]) -> int:
    """Serve; with ``--check`` say by the exit code whether the one that serves is well."""
    if arguments == ["--check"]:
        urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=3).close()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ThreadingHTTPServer(PLACE, Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
