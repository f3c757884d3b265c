"""What to tell a user whose ``setformer_ext._C`` cannot be imported."""

import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

TORCH_IS_MISSING = (
    "{name} needs torch, which is not installed: pip install torch "
    "(setformer_ext._C alone works without it, on any DLPack array)"
)


def explain(error: ImportError, package: Path) -> str:
    """Name the likely cause of a failed ``import _C`` from the folder ``package``."""
    compiled = sorted(path.name for path in package.glob("_C.*") if path.suffix in {".so", ".pyd"})
    if not compiled:
        return f"setformer_ext._C is not compiled: {package} holds no such file. " + (
            "That is the source folder, which comes before an installed setformer_ext: start "
            "Python in another folder, use the command `setformer`, or compile in place with "
            "`pip install -e .`"
            if (package.parent / "pyproject.toml").exists()
            else "Install the package again from its source folder: pip install ."
        )
    if not any(f"_C{suffix}" in compiled for suffix in EXTENSION_SUFFIXES):
        return (
            f"setformer_ext._C is built for another Python: expected _C{EXTENSION_SUFFIXES[0]}, "
            f"found {', '.join(compiled)} in {package}. Install the package with the pip of this "
            "Python: python -m pip install ."
        )
    library = re.match(r"(\S+): cannot open shared object file", str(error))
    if library:
        advice = ", in Debian's package libgomp1" if "libgomp" in library[1] else ""
        return (
            f"setformer_ext._C needs the shared library {library[1]}, which is not on this "
            f"machine: install it{advice}"
        )
    return (
        f"setformer_ext._C was found in {package} but cannot be loaded ({error}). It was probably "
        "built on another machine or with another compiler: install the package again, "
        "pip install --force-reinstall --no-deps ."
    )
