"""The version of this release; the wheel's is read from here (`pyproject.toml`)."""

VERSION = "0.1.0"
