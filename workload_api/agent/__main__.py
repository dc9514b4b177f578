"""``python -m workload_api.agent``."""

import sys

from workload_api.agent.cli import main

sys.exit(main())
