#include "forward_kernels.cuh"

template struct setformer::cuda::ForwardKernels<double>;
