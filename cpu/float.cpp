// Backend and model in float, compiled here for everybody.
#include "gca_cpu.h"
#include "model.h"

template class gca::Cpu<float>;
template struct gca::DRT<gca::Cpu<float>>;
