# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""From a call to a launch, and nothing that knows an operation.

The modules, each above those that it imports. A call goes down: `dispatch.Op` reads the arguments,
finds or makes a plan, and the plan launches.

bound.py : an operation with some arguments fixed, for `PagedKVCache`.
dispatch.py : an operation and its arguments, `Op` and `Arg`; from a call to its plan.
fastpath/ : quicker paths for calls whose signature came before.
plans.py : plans, and the memory that keeps them by their signatures.
making.py : new arrays.
signatures.py : what is part of a signature, and what changes from call to call.
streams.py : the rules of streams: order, and how long memory must live.
indices.py : blocks and slots that the caller chooses, in host memory or on a GPU.
lists.py : arguments that are lists of arrays, one for each layer.
guards.py : comparing arrays with earlier ones.
apart.py : whether arrays that are written share memory.
contract.py : checks of shapes, dtypes, strides, devices and numbers, with their errors.
descriptions.py : arrays without memory, to ask an operation for its kernels.
arrays.py : any framework's array -> address, shape, strides, dtype, device.
launch.py : grids and threads, and a kernel with its parameters, ready to be enqueued.
faults.py : values out of bounds that kernels, or NumPy, have met.
dlpack.py : reading arrays through DLPack and ``__cuda_array_interface__``.
driver.py : what is asked of CUDA: loads, launches, copies, events.
overlap.py : launches that begin before earlier work is done.
modules.py : from a ``.cu`` file to a loaded kernel.
allocations.py : pinned host memory, and what CUDA knows of an address.
cuda.py : CuPy, imported late, and calls of the driver that it lacks.
log.py : the logger.
tracing.py : keeps torch.compile out.
spelling.py : template arguments as C++ spells them.
params.py : the structs of kernels' parameters.
formats.py : dtypes, formats of caches, layouts.
locks.py : locks that are free after a fork.
env.py : the environment variables.
devices.py : what a device is.
"""
