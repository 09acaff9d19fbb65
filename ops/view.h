// A tensor as the operators' loops see it: torch's, or an inference runtime's.
#pragma once

#include "dtype.h"

namespace lf {

// A (batch, heads, rows, channels) tensor of any strides.
struct View {
  char* data;
  int64_t size[4];
  int64_t stride[4];  // in elements
  DType dtype;

  int64_t heads() const { return size[0] * size[1]; }
  int64_t rows() const { return size[2]; }
  int64_t channels() const { return size[3]; }
  // The address of one row of head `index` of batch x heads.
  LF_HOST_DEVICE char* row(int64_t index, int64_t row) const {
    return data + ((index / size[1]) * stride[0] + (index % size[1]) * stride[1] + row * stride[2]) *
                      item_size(dtype);
  }
};

}  // namespace lf
