"""What a forked server or agent finds imported already."""

import alembic.command
import alembic.runtime.migration  # noqa: F401

import workload_api.agent.app
import workload_api.agent.commands  # noqa: F401
