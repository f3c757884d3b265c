#include "on_chip/backward.cuh"

template struct setformer::cuda::OnChipBackward<__half>;
