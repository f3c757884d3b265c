#include "backward_kernels.cuh"

template struct setformer::cuda::BackwardKernels<__half>;
