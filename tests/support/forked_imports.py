"""What a forked server or agent finds imported already."""

import importlib

for name in (
    "alembic.command",
    "alembic.config",
    "alembic.runtime.migration",
    "issuer.app",
    "issuer.cli.server",
    "issuer.lifecycle",
    "rich.console",
    "workload_api.agent.app",
    "workload_api.agent.commands",
):
    importlib.import_module(name)
