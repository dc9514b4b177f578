"""
A service that calls another one, again and again, and says what comes back.

It asks the Envoy beside it, on loopback; that one knows where the other service is, who it must
be, and by which identity to ask.  With ``--serve HOST:PORT`` it also asks on behalf of whoever
opens that page.
"""

import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

API = "http://127.0.0.1:9000/hello"
PAUSE = 5.0


class Page(BaseHTTPRequestHandler):
    """Shows what the API answers now."""

    def do_GET(self) -> None:
        """Ask, and pass on the answer with its code."""
        code, text = ask()
        body = f"api answered {code}: {text}\n".encode()
        self.send_response(code)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Leave the log to the other thread."""


def ask() -> tuple[int, str]:
    """Code and text of one answer; 502 where there is none."""
    try:
        with urllib.request.urlopen(API, timeout=3) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode().strip()
    except OSError as error:
        return 502, str(error)


def ask_for_ever() -> None:
    """Print one line for each answer."""
    while True:
        code, text = ask()
        print(f"api answered {code}: {text}")  # noqa: T201 a container's log
        time.sleep(PAUSE)


def main(arguments: list[str]) -> int:
    """Run; with ``--check`` say by the exit code whether anybody answers behind the Envoy."""
    if arguments == ["--check"]:
        return 0 if ask()[0] < 500 else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if arguments[:1] == ["--serve"]:
        host, _, port = arguments[1].partition(":")
        page = ThreadingHTTPServer((host, int(port)), Page)
        threading.Thread(target=page.serve_forever, daemon=True).start()
    ask_for_ever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
