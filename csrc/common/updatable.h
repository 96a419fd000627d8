// What an update in place asks of its operands. For every device; Python words the refusals better.
#pragma once

#include "layout.h"

#include <initializer_list>

namespace pyext {

// Whether two indices may share an address: a stride is within the run of the shorter ones.
inline bool overlaps_itself(const Tensor& t) {
  if (t.is_contiguous()) return false;
  int64_t run = 1;
  for (const auto& [stride, size] : sorted_steps(t)) {
    if (stride < run) return true;
    run += stride * (size - 1);
  }
  return false;
}

struct AddressRange {
  uintptr_t begin = 0, end = 0;

  // From the first to the last element; of no elements, empty.
  explicit AddressRange(const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return;
      last += strides[d] * (sizes[d] - 1);
    }
    begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    end = begin + (last + 1) * t.element_size();
  }

  bool meets(const AddressRange& other) const { return begin < other.end && other.begin < end; }
};

// Refuses an update that would write an element twice, or change another operand.
inline void check_updatable(const char* op, std::initializer_list<const Tensor*> updated,
                            std::initializer_list<const Tensor*> read) {
  for (auto each = updated.begin(); each != updated.end(); ++each) {
    STD_TORCH_CHECK(!overlaps_itself(**each), op,
                    ": elements of what it updates share a memory location");
    const AddressRange range(**each);
    const auto apart_from = [&](const Tensor* other) {
      STD_TORCH_CHECK(!range.meets(AddressRange(*other)), op,
                      ": what it updates shares memory with another operand");
    };
    std::for_each(each + 1, updated.end(), apart_from);
    std::for_each(read.begin(), read.end(), apart_from);
  }
}

}  // namespace pyext
