// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Launches that begin before the work in front of them in their stream is done (sm_90 and newer).
#pragma once

namespace cupy_cache {

// The first statement of every kernel, before it reads or writes anything but its own parameters.
//
// A launch that may overlap gets its processors while the kernel in front of it still runs. Here all
// its threads wait until that one is done, and all that it wrote is seen. So a kernel that is done
// has waited for the one in front of it, and that one for the one before: waiting for one is waiting
// for all. This holds only if every thread comes here, also one that has nothing to do.
//
// From then on the next launch may begin, if it may overlap: it waits here too, for the whole of this
// one. Before it, no more than two launches would be under way at once, and no further one begins
// while any kernel but the last still runs. An ordinary launch is not let begin by this.
__device__ __forceinline__ void await_earlier_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace cupy_cache
