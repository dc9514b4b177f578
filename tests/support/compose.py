"""
docker-compose.yml in an engine of its own, with images that are built there.

By their own Dockerfiles, from a base that is made of this machine's Python and an index of the
pinned packages; Envoy's image is made of the program that other tests run.
"""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.containers import Engine, why_not
from tests.support.envoy import PROGRAM
from tests.support.images import INDEX, base_image, one_program, why_no_base
from tests.support.netns import raise_loopback
from tests.support.stack import ROOT

BASE, ENVOY = "local/python:1", "local/envoy:1"
PAGE = "http://127.0.0.1:8080/"
"""The one port that is open, in the engine's network."""
_NEEDED = ("docker", "dockerd", "containerd", "runc", "setpriv", "unshare", "nsenter",
           "iptables", "docker-compose", "curl")  # fmt: skip


def why_no_project() -> str | None:
    """Why it cannot be brought up here; None when it can."""
    return why_not(*_NEEDED) or why_no_base()


class BridgedEngine(Engine):
    """Docker as it is out of the box, with networks and their rules; in its own network."""

    def daemon(self) -> Sequence[str]:
        """See `Engine`."""
        left_out = ("--iptables", "--ip6tables", "--ip-masq", "--ip-forward")
        return [one for one in super().daemon() if not one.startswith(left_out)]

    def load(self, name: str, tar: bytes, *changes: str) -> None:
        """Make an image of a tar."""
        words = [word for one in changes for word in ("--change", one)]
        self.run(self.program, "import", *words, "-", name, given=tar)

    def run(self, *command: str, given: bytes | None = None) -> str:
        """Run *command* as its client, and return what that printed."""
        done = subprocess.run(
            command, env=self.environment, input=given, capture_output=True, timeout=150
        )
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout.decode()


@dataclass(frozen=True)
class Project:
    """docker-compose.yml, in an engine that has its images."""

    engine: BridgedEngine

    @property
    def become(self) -> tuple[str, ...]:
        """What a command is run through to be where the engine's ports are, and to find it."""
        told = [f"{name}={value}" for name, value in self.engine.environment.items()]
        return ("nsenter", f"--net=/proc/{self.engine.pid}/ns/net", "env", *told)

    def compose(self, *words: str) -> str:
        """Run docker-compose, and return what it printed."""
        return self.engine.run(*self.become, "docker-compose", *words)

    def docker(self, *words: str) -> str:
        """Run docker, and return what it printed."""
        return self.engine.run(self.engine.program, *words)

    def logs(self, service: str, text: str) -> None:
        """Wait until *service* has said something; Envoy says it once a second."""
        end = time.monotonic() + 30
        while text not in self.compose("logs", service):
            assert time.monotonic() < end, f"{service} never says {text}"

    def python(self, service: str, program: str) -> str:
        """Run a Python program beside a service, and return what it printed."""
        return self.compose("exec", "-T", service, "python3", "-c", program)

    def issuer(self, *words: str) -> Any:
        """What the server answers to an operator."""
        return json.loads(
            self.compose("exec", "-T", "server", "issuer", *words, "--output", "json")
        )

    def served(self) -> None:
        """Wait until there is a good answer at the one open port."""
        self._asked("--retry", "30", "--retry-delay", "1", "--retry-all-errors")

    def asked(self) -> str:
        """What somebody on this machine gets at the one open port."""
        return self._asked()

    def _asked(self, *how: str) -> str:
        return self.engine.run(*self.become, "curl", "-sS", "--fail", *how, PAGE)

    def containers(self) -> dict[str, Any]:
        """All that the engine knows of the containers that run, by service."""
        found = json.loads(self.docker("inspect", *self.docker("ps", "--quiet").split()))
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}


@contextlib.contextmanager
def a_project() -> Iterator[Project]:
    """The project, built, and not up."""
    assert PROGRAM is not None
    compose = shutil.which("docker-compose")
    with BridgedEngine() as engine, tempfile.TemporaryDirectory() as folder:
        # It would colour its log where nobody sees it, and take what is typed meanwhile.
        plain = Path(folder, "docker-compose")
        plain.write_text(f'#!/bin/sh\nexec {compose} --ansi never "$@" < /dev/null\n')
        plain.chmod(0o755)
        quick = Path(folder, "quick.yml")
        often = {"healthcheck": {"interval": "1s"}}
        names = ("server", "agent", "api", "web", "batch")
        quick.write_text(json.dumps({"services": dict.fromkeys(names, often)}))
        engine.environment |= {
            "PATH": f"{folder}:{engine.environment['PATH']}",
            # As it is, but for how long one waits for the first look at a service.
            "COMPOSE_FILE": f"{ROOT / 'docker-compose.yml'}:{quick}",
            "COMPOSE_PROJECT_NAME": "compose",
            "BASE_IMAGE": BASE,
            "ENVOY_IMAGE": ENVOY,
            "DOCKER_BUILDKIT": "0",  # not on every machine; and this one works on all
        }
        raise_loopback(engine.pid)
        engine.load(BASE, base_image(), f"ENV PIP_INDEX_URL=file://{INDEX}")
        engine.load(ENVOY, one_program(PROGRAM, Path("/usr/local/bin/envoy")))
        project = Project(engine)
        project.compose("build", "server", "agent", "api")  # the others' are the same
        try:
            yield project
        finally:
            project.compose("down", "--volumes")
