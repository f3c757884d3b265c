// What the CUDA half of this binary finds on this machine. Without a device, a driver or CUDA in
// the build none of these functions throws or stops the program.
#pragma once

#include <string>
#include <vector>

namespace setformer::cuda {

// Does this binary have CUDA kernels?
bool compiled();

// "13.0", the version of the runtime linked in; empty without CUDA in the build.
std::string runtime_version();

// "13.0", the newest CUDA version the installed driver supports; empty where there is no driver.
std::string driver_version();

// One line a device: name, compute capability, memory, and whether this binary has code for it.
// Empty where there is no device. Starts the CUDA context of each device: for reports only.
std::vector<std::string> devices();

}  // namespace setformer::cuda
