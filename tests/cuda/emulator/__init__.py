"""Runs CUDA kernels without a GPU: nvcc's PTX becomes C++, and each CUDA thread a fiber.

ptx.py reads PTX; emitter.py, arithmetic.py and movement.py translate its instructions, translate.py
its functions; counting.py tells what each asks of the hardware; runtime/ gives the instructions
their meaning and stands for the CUDA runtime, so that host code that nvcc compiled runs as it is;
build.py puts all of it together; device.py is what tests see of the emulated devices. What runs is
PTX: neither ptxas's choices nor the speed and the memory model of a GPU are emulated.
"""
