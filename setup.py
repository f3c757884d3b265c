"""A thin door to CMakeLists.txt, which describes the whole build."""

import os
import re
import sys
import tempfile

from setuptools import setup

# The first is CMake's own and wins; users of compiled torch packages know the second.
numbers = {name: os.environ.get(name, "") for name in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS")}
for name, number in numbers.items():
    if number and not re.fullmatch("[1-9][0-9]{0,3}", number):
        sys.exit(
            f"{name} must be the number of compilers to run at once, from 1 to 9999, got "
            f"{number!r}. Leave it out to run one for each processor."
        )
os.environ["CMAKE_BUILD_PARALLEL_LEVEL"] = next(filter(None, numbers.values()), "")

# Nothing is written beside the sources, which may be read-only, and no file of an earlier build
# gets into this one.
with tempfile.TemporaryDirectory(prefix="setformer_ext-") as folder:
    setup(
        cmake_source_dir=".",
        options={"build": {"build_base": folder}, "egg_info": {"egg_base": folder}},
    )
