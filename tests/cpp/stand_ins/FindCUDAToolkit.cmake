# A stand-in for CMake's own module: CUDA's runtime is the stand-in beside TensorRT's.
set(CUDAToolkit_INCLUDE_DIRS ${TENSORRT_ROOT}/include)
add_library(CUDA::cudart SHARED IMPORTED)
set_target_properties(CUDA::cudart PROPERTIES IMPORTED_LOCATION ${TENSORRT_ROOT}/lib/libcudart.so)
set(CUDAToolkit_FOUND TRUE)
