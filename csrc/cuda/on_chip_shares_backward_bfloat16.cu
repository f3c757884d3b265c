#include "on_chip/share_backward.cuh"

template struct setformer::cuda::SharedBackward<__nv_bfloat16>;
