/// This machine, as build keys and latency tables name it.
#pragma once

#include <string>

namespace variator {

/// The processor's name.
std::string cpu_name();

/// Instruction sets that decide which kernels a library uses, apart by blanks.
std::string cpu_features();

/// Processors this process may use.
int cores();

/// Processors there are.
int all_cores();

}  // namespace variator
