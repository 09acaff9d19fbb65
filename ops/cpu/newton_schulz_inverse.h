#pragma once

#include <cstdint>

namespace lf {

// (w + eps I)^-1 of one matrix of m rows, padded(m) apart; `shared` spreads each product over the threads.
template <typename T>
void invert(const T* w, int64_t m, int64_t iters, double eps, bool shared, T* inverse);

// Whether matrices of this size are better taken one after another, each by all threads, than each by one
// thread.
bool invert_shared(int64_t matrices, int64_t m);

}  // namespace lf
