// Which instruction set's kernels run: the best this machine has, unless told otherwise.
#pragma once

#include <span>
#include <string_view>

#include "kernels.hpp"

namespace fastema {

// What this build holds and this machine runs, best first. "baseline" is always the last.
std::span<const Kernels* const> available() noexcept;

const Kernels& active() noexcept;

// Returns false, and changes nothing, where `name` is not among available().
bool activate(std::string_view name) noexcept;

}  // namespace fastema
