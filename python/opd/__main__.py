# SPDX-License-Identifier: Apache-2.0
"""`python -m opd` is the `opd` command."""

import sys

from opd.cli import main

sys.exit(main())
