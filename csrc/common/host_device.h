// host_device.h: marks of the functions that the CPU's and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define GRADOPS_BOTH __host__ __device__
#else
#define GRADOPS_BOTH
#endif
#if defined(__CUDACC__) || defined(GRADOPS_CUDA_EMU)
#define GRADOPS_SHARED GRADOPS_BOTH inline
#else  // CPU kernels may share no symbol between the levels (common/isa.h)
#define GRADOPS_SHARED [[gnu::always_inline]] inline
#endif
