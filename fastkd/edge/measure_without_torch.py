"""The worker, started as a file for an artifact that is no folder: `import fastkd` loads torch, and its seconds and
hundreds of megabytes would stand in the cold start and memory of a runtime that needs none of it."""

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("fastkd")  # without what its __init__ imports
package.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["fastkd"] = package

from fastkd.edge.measure_worker import main  # noqa: E402

sys.exit(main())
