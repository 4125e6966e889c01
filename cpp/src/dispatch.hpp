// Which instruction set's kernels run: the best this machine has, unless told otherwise.
#pragma once

#include "kernels.hpp"

namespace fastema {

const Kernels& active() noexcept;

}  // namespace fastema
