#include "on_chip/share_forward.cuh"

template struct setformer::cuda::SharedForward<__nv_bfloat16>;
