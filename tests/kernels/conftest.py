"""Triton decides when a kernel is decorated whether it is interpreted: those tests have a process of their own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
