"""``python -m emd_retrieval.cli``."""

import sys

from emd_retrieval.cli.main import main

sys.exit(main())
