"""The wheel in an empty environment: it imports, runs and migrates with nothing of the tree."""

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment that holds the wheel alone, over the dependencies installed here."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Dependencies come from this environment; the project's own editable install must not.
    (here,) = {
        p
        for p in map(Path, sys.path)
        if p.name == "site-packages" and p.is_relative_to(sys.prefix)
    }
    for found in here.iterdir():
        target = site / found.name
        if not target.exists() and "spiffe_issuer" not in found.name and found.suffix != ".pth":
            target.symlink_to(found)
    yield folder / "bin" / "python"


def test_the_wheel_holds_the_packages_and_the_migrations(wheel: Path) -> None:
    """Tests, tools and protos stay out; the migrations come along."""
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {
        "ca",
        "issuer",
        "spiffe_core",
        "spiffe_wire",
        "workload_api",
        "spiffe_issuer-0.1.0.dist-info",
    }
    assert any(
        n.startswith("issuer/_migrations/versions/0001")
        for n in zipfile.ZipFile(wheel).namelist()
    )


@pytest.mark.parametrize("module", ["issuer", "workload_api.agent"])
def test_the_commands_run_from_the_wheel(python: Path, module: str, tmp_path: Path) -> None:
    """Both commands print their help outside the tree."""
    ran = subprocess.run(
        [python, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "usage:" in ran.stdout


def test_the_wheel_migrates_a_new_database(python: Path, tmp_path: Path) -> None:
    """`issuer db upgrade` finds its migrations in the wheel."""
    config = tmp_path / "issuer.yaml"
    config.write_text(f"trust_domain: example.org\ndata_dir: {tmp_path / 'data'}\n")
    ran = subprocess.run(
        [python, "-m", "issuer", "db", "upgrade", "-c", str(config)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
