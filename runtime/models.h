// The models that there are: a DRT on each backend of this build, each compiled once (cpu/float.cpp, cpu/double.cpp,
// cpu/bf16.cpp, kernels/drt.cpp).
#pragma once
#include "cpu/backend.h"
#include "model.h"
#ifdef GCA_CUDA
#include "gca_kernels.cuh"
#endif

namespace gca {

extern template class Cpu<float>;
extern template class Cpu<double>;
extern template class Cpu<float, true>;
extern template struct DRT<Cpu<float>>;
extern template struct DRT<Cpu<double>>;
extern template struct DRT<Cpu<float, true>>;
#ifdef GCA_CUDA
extern template struct DRT<Gpu<float>>;
extern template struct DRT<Gpu<__nv_bfloat16>>;
#endif

}  // namespace gca
