// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// A compiled torch operation that takes what vLLM's reshape_and_cache_flash takes, checks nothing and
// launches one kernel: what a call costs on the host at least, by way of torch's dispatcher.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>

void launch_write(const void* key, const void* value, void* key_cache, void* value_cache,
                  const long* slots, long tokens, long vectors, void* stream);

namespace {

void write(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_cache,
           at::Tensor& value_cache, const at::Tensor& slot_mapping, const std::string&,
           const at::Tensor&, const at::Tensor&) {
  const long vectors = key.size(1) * key.size(2) * key.element_size() / 16;
  launch_write(key.data_ptr(), value.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
               slot_mapping.data_ptr<int64_t>(), slot_mapping.size(0), vectors,
               c10::cuda::getCurrentCUDAStream().stream());
}

}  // namespace

TORCH_LIBRARY(cupy_cache_benchmarks, library) {
  library.def(
      "write(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()");
}

TORCH_LIBRARY_IMPL(cupy_cache_benchmarks, CUDA, library) { library.impl("write", &write); }
