/// Everything a C++ program needs. Other languages: `variator/variator.h`.
#pragma once

#include "variator/bundle.hpp"   // IWYU pragma: export
#include "variator/engine.hpp"   // IWYU pragma: export
#include "variator/errors.hpp"   // IWYU pragma: export
#include "variator/key.hpp"      // IWYU pragma: export
#include "variator/latency.hpp"  // IWYU pragma: export
#include "variator/policy.hpp"   // IWYU pragma: export
#include "variator/runtime.hpp"  // IWYU pragma: export
