#include "on_chip/cluster_forward.cuh"

template struct setformer::cuda::OnClusterForward<__half>;
