"""Loads the scripts, which are no package: each is a file on its own."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("algos", "rlhf") for path in (ROOT / folder).glob("*.py")
)


def load_script(path: str):
    """The script at this path (relative to the repository) as a module, loaded once."""
    name = "plainrl_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
