// The threads that the loops run on: torch's, or an inference runtime's. Each library that these loops are
// linked into defines both functions.
#pragma once

#include <cstdint>

namespace lf {

// The most threads that a loop may take now.
int64_t pool_threads();

// Calls run(state) up to `times` times, at least once unless that is 0, on as many threads as are free, this
// one among them. Returns when all calls have; throws what one of them threw.
void run_on_pool(int64_t times, void (*run)(void*), void* state);

}  // namespace lf
