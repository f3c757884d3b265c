#include "backward_kernels.cuh"
#include "forward_kernels.cuh"

template struct setformer::cuda::Kernels<__half>;
