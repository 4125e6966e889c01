#include "tf_c_api.hpp"

#include <dlfcn.h>

namespace fastema::tf {

#define FASTEMA_TF_DEFINE(name, result, parameters) result(*name) parameters = nullptr;
FASTEMA_TF_FUNCTIONS(FASTEMA_TF_DEFINE)
#undef FASTEMA_TF_DEFINE

const char* resolve() noexcept {
#ifdef __APPLE__
  constexpr const char* kFramework = "libtensorflow_framework.2.dylib";
#else
  constexpr const char* kFramework = "libtensorflow_framework.so.2";
#endif
  void* framework = dlopen(kFramework, RTLD_NOW | RTLD_NOLOAD);
  if (framework == nullptr) return kFramework;
#define FASTEMA_TF_RESOLVE(name, result, parameters)                            \
  name = reinterpret_cast<result(*) parameters>(dlsym(framework, "TF_" #name)); \
  if (name == nullptr) return "TF_" #name;
  FASTEMA_TF_FUNCTIONS(FASTEMA_TF_RESOLVE)
#undef FASTEMA_TF_RESOLVE
  return nullptr;
}

}  // namespace fastema::tf
