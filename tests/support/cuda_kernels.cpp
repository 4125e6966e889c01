// The CUDA kernels on the processor. As a library: run(), called by test_cuda_kernels.py. As a
// program: every mix (a bit of MIXES each), rounding and alignment in memory of just the right
// size, for the sanitizers.
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_shim.h"

namespace {

template <class... Parameters, size_t... kIndex>
void launch(void (*kernel)(Parameters...), unsigned blocks, void** arguments,
            std::index_sequence<kIndex...>) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < fastema::kThreads; ++threadIdx.x) {
      kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndex])...);
    }
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), unsigned blocks, void** arguments) {
  launch(kernel, blocks, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace

// What cuLaunchKernel does: an argument is where a parameter lies. False: no such kernel.
extern "C" bool run(const char* name, unsigned blocks, void** arguments) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("update 0")) {
    launch(fastema::update<MIXES, 0>, blocks, arguments);
  } else if (is("update 1")) {
    launch(fastema::update<MIXES, 1>, blocks, arguments);
  } else if (is("update 2")) {
    launch(fastema::update<MIXES, 2>, blocks, arguments);
  } else if (is("swap")) {
    launch(fastema::swap, blocks, arguments);
  } else if (is("advance")) {
    launch(fastema::advance, blocks, arguments);
  } else {
    return false;
  }
  return true;
}

int main() {
  constexpr size_t kBytes[fastema::kTypes] = {2, 2, 4, 8};
  for (uint32_t mix = 0; MIXES >> mix != 0; ++mix) {
    if ((MIXES >> mix & 1) == 0) continue;
    const uint32_t average_type = mix / fastema::kTypes, value_type = mix % fastema::kTypes;
    const size_t average_bytes = kBytes[average_type], value_bytes = kBytes[value_type];
    for (size_t size : {1u, 9u, 2049u}) {
      for (size_t place = 0; place < 64; ++place) {  // of the average, and of both others
        const size_t a = place % 8 * average_bytes, v = place / 8 * value_bytes;
        const size_t c = place / 8 * average_bytes;
        std::vector<char> average(a + size * average_bytes), value(v + size * value_bytes);
        std::vector<char> carry(c + size * average_bytes);
        fastema::Tensor tensor{average.data() + a, value.data() + v, size, mix, 0};
        const fastema::Tensor* tensors = &tensor;
        void* row = carry.data() + c;
        void* const* carries = &row;
        std::vector<fastema::Chunk> table;
        uint32_t chunk = 1024, lists = 1;
        for (uint32_t i = 0; i * chunk < size; ++i) table.push_back({0, i});
        const fastema::Chunk* chunks = table.data();
        fastema::Decays decays{nullptr, {0.9}};
        uint64_t seed = 1, step = 2;
        void* all[] = {&tensors, &carries, &chunks, &chunk, &lists, &decays, &seed, &step};
        void* three[] = {&tensors, &chunks, &chunk};
        const auto blocks = static_cast<unsigned>(table.size());
        for (const char* name : {"update 0", "update 1", "update 2"}) run(name, blocks, all);
        if (average_type == value_type) run("swap", blocks, three);
      }
    }
  }
  return 0;
}
