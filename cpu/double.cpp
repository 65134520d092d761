// Backend and model in double, compiled here for everybody.
#include "gca_cpu.h"
#include "model.h"

template class gca::Cpu<double>;
template struct gca::DRT<gca::Cpu<double>>;
