"""A fresh Python process, for what one process can only do once or what leaves traces in it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any


def fresh(code: str, timeout: float = 300, **environment: str) -> Any:
    """Run code that assigns `result` in a process of its own, and return it (as JSON carries it).

    The modules of this folder can be imported there.
    """
    script = textwrap.dedent(code) + "\nimport json\nprint('\\n' + json.dumps(result))\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
