#pragma once

#include "kernels.h"

#include <string>
#include <vector>

namespace mixlocal {

// The kernels this CPU and its operating system can run, best first; never empty.
const std::vector<const KernelTable*>& available_kernels();

// The table of that name. Throws std::invalid_argument if this machine cannot run it.
const KernelTable& kernels_named(const std::string& name);

}  // namespace mixlocal
