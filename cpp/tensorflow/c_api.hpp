// The part of TensorFlow's C API that the ops call, declared here and resolved when the library is
// loaded: so it is built without TensorFlow, and one binary serves every version. The API's C types
// have no layout of ours.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastema::tf {

struct Status;
struct Tensor;
struct OpDefinitionBuilder;
struct ShapeInferenceContext;
struct KernelBuilder;
struct OpKernelConstruction;
struct OpKernelContext;
struct VariableInputLockHolder;

enum Code { kOk = 0, kInvalidArgument = 3, kResourceExhausted = 8 };
enum DataType { kFloat = 1, kDouble = 2, kBfloat16 = 14, kHalf = 19 };

// Copies one tensor to another and deletes both.
using CopyTensor = void (*)(OpKernelContext*, Tensor* from, Tensor* to);

// name, result, parameters
#define FASTEMA_TF_FUNCTIONS(F)                                                             \
  F(NewStatus, Status*, ())                                                                 \
  F(DeleteStatus, void, (Status*))                                                          \
  F(SetStatus, void, (Status*, Code, const char*))                                          \
  F(GetCode, Code, (const Status*))                                                         \
  F(NewOpDefinitionBuilder, OpDefinitionBuilder*, (const char*))                            \
  F(OpDefinitionBuilderAddAttr, void, (OpDefinitionBuilder*, const char*))                  \
  F(OpDefinitionBuilderAddInput, void, (OpDefinitionBuilder*, const char*))                 \
  F(OpDefinitionBuilderAddOutput, void, (OpDefinitionBuilder*, const char*))                \
  F(OpDefinitionBuilderSetIsStateful, void, (OpDefinitionBuilder*, bool))                   \
  F(OpDefinitionBuilderSetShapeInferenceFunction, void,                                     \
    (OpDefinitionBuilder*, void (*)(ShapeInferenceContext*, Status*)))                      \
  F(RegisterOpDefinition, void, (OpDefinitionBuilder*, Status*))                            \
  F(ShapeInferenceContextSetUnknownShape, void, (ShapeInferenceContext*, Status*))          \
  F(NewKernelBuilder, KernelBuilder*,                                                       \
    (const char*, const char*, void* (*)(OpKernelConstruction*),                            \
     void (*)(void*, OpKernelContext*), void (*)(void*)))                                   \
  F(RegisterKernelBuilder, void, (const char*, KernelBuilder*, Status*))                    \
  F(OpKernelConstruction_GetAttrSize, void,                                                 \
    (OpKernelConstruction*, const char*, std::int32_t* size, std::int32_t* total, Status*)) \
  F(OpKernelContext_Failure, void, (OpKernelContext*, Status*))                             \
  F(NumInputs, int, (OpKernelContext*))                                                     \
  F(GetInput, void, (OpKernelContext*, int, Tensor**, Status*))                             \
  F(AllocateOutput, Tensor*,                                                                \
    (OpKernelContext*, int, DataType, const std::int64_t*, int, std::size_t, Status*))      \
  F(NewTensor, Tensor*,                                                                     \
    (DataType, const std::int64_t*, int, void* data, std::size_t bytes,                     \
     void (*release)(void* data, std::size_t bytes, void* held), void* held))               \
  F(SetOutput, void, (OpKernelContext*, int, const Tensor*, Status*))                       \
  F(DeleteTensor, void, (Tensor*))                                                          \
  F(TensorData, void*, (const Tensor*))                                                     \
  F(TensorByteSize, std::size_t, (const Tensor*))                                           \
  F(TensorElementCount, std::int64_t, (const Tensor*))                                      \
  F(TensorType, DataType, (const Tensor*))                                                  \
  F(NumDims, int, (const Tensor*))                                                          \
  F(Dim, std::int64_t, (const Tensor*, int))

// What TensorFlow 2.20 and 2.21 do not export: the variables behind resource inputs.
#define FASTEMA_TF_VARIABLE_FUNCTIONS(F)                                                      \
  F(MaybeLockVariableInputMutexesInOrder, void,                                               \
    (OpKernelContext*, bool do_lock, bool sparse, const int* inputs, std::size_t, CopyTensor, \
     VariableInputLockHolder**, Status*))                                                     \
  F(ReleaseVariableInputLockHolder, void, (VariableInputLockHolder*))                         \
  F(GetInputTensorFromVariable, void,                                                         \
    (OpKernelContext*, int input, bool lock_held, bool is_variant, bool sparse, CopyTensor,   \
     Tensor**, Status*))

#define FASTEMA_TF_DECLARE(name, result, parameters) extern result(*name) parameters;
FASTEMA_TF_FUNCTIONS(FASTEMA_TF_DECLARE)
FASTEMA_TF_VARIABLE_FUNCTIONS(FASTEMA_TF_DECLARE)
#undef FASTEMA_TF_DECLARE

// Finds the first of these in the TensorFlow of this process.
bool resolve() noexcept;

// Finds those for variables; after resolve().
bool resolve_for_variables() noexcept;

}  // namespace fastema::tf
