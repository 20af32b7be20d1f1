// The two opaque types that TensorRT's headers want of CUDA, so that a board needs no CUDA headers.
#pragma once
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
