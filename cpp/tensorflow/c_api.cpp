// Finds TensorFlow's functions among the libraries that are loaded.
#include "c_api.hpp"

#include "fastema/system.hpp"

namespace fastema::tf {

#define FASTEMA_TF_DEFINE(name, result, parameters) result(*name) parameters = nullptr;
FASTEMA_TF_FUNCTIONS(FASTEMA_TF_DEFINE)
FASTEMA_TF_VARIABLE_FUNCTIONS(FASTEMA_TF_DEFINE)
#undef FASTEMA_TF_DEFINE

namespace {

void* framework() noexcept {
  constexpr const char* kNames[] = {"libtensorflow_framework."};  // .so.2, .2.dylib
  static void* const handle = loaded_library_like(kNames);
  return handle;
}

template <class Function>
bool find(Function*& function, const char* name) noexcept {
  function = framework() ? reinterpret_cast<Function*>(function_in(framework(), name)) : nullptr;
  return function != nullptr;
}

}  // namespace

#define FASTEMA_TF_FIND(name, result, parameters) &&find(name, "TF_" #name)
bool resolve() noexcept { return true FASTEMA_TF_FUNCTIONS(FASTEMA_TF_FIND); }
bool resolve_for_variables() noexcept {
  return true FASTEMA_TF_VARIABLE_FUNCTIONS(FASTEMA_TF_FIND);
}
#undef FASTEMA_TF_FIND

}  // namespace fastema::tf
