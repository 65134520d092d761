// SwiGLU of one number: what the op and the products that make it on their way share, to the bit.
#pragma once
#include "kernels/device.cuh"

namespace gca {

// silu(gate) * up, silu(z) = z / (1 + e^-z)
__device__ inline float swiglu(float gate, float up) { return gate / (1 + expf(-gate)) * up; }

}  // namespace gca
