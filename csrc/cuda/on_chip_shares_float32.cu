#include "on_chip/share_forward.cuh"

template struct setformer::cuda::SharedForward<float>;
