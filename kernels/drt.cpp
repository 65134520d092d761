// The model on the GPU in float and bf16, compiled here for everybody.
#include "gca_kernels.cuh"
#include "model.h"

template struct gca::DRT<gca::Gpu<float>>;
template struct gca::DRT<gca::Gpu<__nv_bfloat16>>;
