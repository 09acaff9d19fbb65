#pragma once

#include "../view.h"

namespace lf {

template <typename T>
struct AttentionConstants {
  T scale, tau;
};

// What the backward pass needs of the forward pass, see schemas.cpp; contiguous.
template <typename T>
struct Saved {
  T *inverse, *sums, *mass, *mean_value;
};

// T is what is computed in: float, or double for float64 views.
template <typename T>
void attention_forward(const View& q, const View& k, const View& v, const View& landmark_view,
                       AttentionConstants<T> constants, int64_t iters, double eps, const View& out,
                       Saved<T> saved);

template <typename T>
void attention_backward(const View& grad, const View& q, const View& k, const View& v,
                        const View& landmark_view, Saved<T> saved, AttentionConstants<T> constants,
                        const View& dq, const View& dk, const View& dv, const View& dlandmarks);

}  // namespace lf
