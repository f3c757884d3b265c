"""A thin door to CMakeLists.txt, which describes the whole build."""

import os

from setuptools import setup

# The variable that users of compiled torch packages know; CMake's own name wins.
if "MAX_JOBS" in os.environ:
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", os.environ["MAX_JOBS"])

setup(cmake_source_dir=".")
