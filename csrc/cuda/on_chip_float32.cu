#include "on_chip/forward.cuh"

template struct setformer::cuda::OnChipForward<float>;
