# shellcheck shell=bash
# Variables of NCCL, CUDA and torch for a run: `source launch/env.sh`. launch/pretrain_kvpo.sh does so by itself.
# What is set already is left alone, as everywhere below: ${NAME=value} assigns only where NAME is unset.

# One thread a process: ranks share the cores, and Python's part of a rank is one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS=1}"

# Lines appear in the log when they are written, not when a buffer is full or the process is killed.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED=1}"

# Segments grow in place, so memory is not lost to fragments between passes of many sizes. (Ranks that are
# started without this file set it too: parallel/groups.py. Figures of docs/benchmarks up to commit 05b13bf had it not.)
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

# Megatron's tensor parallelism wants kernels to start in the order of their launches, so that an exchange is
# not overtaken by the product that it should run beside: one hardware queue. megatron-core asks for it with
# sequence parallel on Hopper and earlier.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS=1}"

# A collective that fails or runs out of parallel.timeout_s ends the process (3: at once, since cleaning up can
# hang too), so that torchrun ends the other ranks instead of all of them waiting for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING=3}"

# The last collectives of each rank are kept: when one times out, they tell who was missing where. (Older
# torch knows this as TORCH_NCCL_TRACE_BUFFER_SIZE.)
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}"

# They go to a file then, TORCH_NCCL_DEBUG_INFO_TEMP_FILE with the rank behind it.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT=1}"

# Errors and what NCCL finds wrong with the machine; INFO prints every ring.
export NCCL_DEBUG="${NCCL_DEBUG=WARN}"

# How long an adapter waits for an answer: 4.096 us x 2^22 = 17 s a try, so that a switch may reroute. NCCL's
# default is a quarter of it, or less.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT=22}"

# Not set here, on purpose:
# NCCL_IB_HCA         which InfiniBand adapters: the topology's `environment`, since it is the cluster's matter.
# NCCL_SOCKET_IFNAME  which interface for the first contact: NCCL guesses well; set it where there are several.
# NCCL_NVLS_ENABLE    multicast in NVLink switches: some hosts forbid it and say so with 0. Left as it is found.
