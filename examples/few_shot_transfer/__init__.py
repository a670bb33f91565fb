"""The study of arXiv 2402.15414 as a program: scenarios, methods, controls, results. See README.md beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


# Read when torch is imported: threads that wait let go of the core after a moment. A long busy wait makes every step
# several times slower as soon as another program wants one of few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The scripts beside this package share modules (packages.py, vader.py) with it.
if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.append(str(Path(__file__).parents[1]))
