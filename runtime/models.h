// The models that there are: a DRT on each backend of this build.
#pragma once
#include "gca_cpu.h"
#include "model.h"
#ifdef GCA_CUDA
#include "gca_kernels.cuh"
#endif
