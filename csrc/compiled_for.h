// What a file is compiled for: KD_HD marks functions for host and device, KD_ISA names the instruction set.
//
// Every translation unit with an instruction set of its own defines KD_ISA to its own namespace. Without that
// the linker would take one unit's inline function for all of them.
#pragma once

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#else
#define KD_HD inline __attribute__((always_inline))
#endif

#ifndef KD_ISA
#define KD_ISA generic
#endif
