#include "forward_kernels.cuh"

template struct setformer::cuda::ForwardKernels<__nv_bfloat16>;
