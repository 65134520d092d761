// The naive bf16 twin and its model, compiled here for everybody.
#include "gca_cpu.h"
#include "model.h"

template class gca::Cpu<float, true>;
template struct gca::DRT<gca::Cpu<float, true>>;
