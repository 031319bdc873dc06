# Called by CMakeLists.txt; here, because what it takes to link NVSHMEM concerns nothing else.
if(NOT EP_BACKEND_NVSHMEM OR (EP_BACKEND_NVSHMEM STREQUAL "AUTO" AND NOT build_cuda))
  message(STATUS "ep_backend: without NVSHMEM (EP_BACKEND_NVSHMEM=${EP_BACKEND_NVSHMEM})")
  return()
endif()
if(NOT build_cuda)
  message(FATAL_ERROR "EP_BACKEND_NVSHMEM=${EP_BACKEND_NVSHMEM} needs the CUDA kernels: set EP_BACKEND_CUDA=ON")
endif()

if(NOT NVSHMEM_ROOT)
  # The wheels nvidia-nvshmem-cu13 and -cu12; a build in isolation does not see them.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(next(iter(u.find_spec('nvidia.nvshmem').submodule_search_locations)))"
    OUTPUT_VARIABLE NVSHMEM_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
# Wheels have only the versioned name. NO_CACHE: a build folder is used again, with another NVSHMEM_ROOT, too.
find_file(NVSHMEM_HOST_LIBRARY NAMES libnvshmem_host.so.3
  PATHS ${NVSHMEM_ROOT}/lib NO_DEFAULT_PATH NO_CACHE)
find_file(NVSHMEM_DEVICE_LIBRARY NAMES libnvshmem_device.a
  PATHS ${NVSHMEM_ROOT}/lib NO_DEFAULT_PATH NO_CACHE)
if(NOT NVSHMEM_HOST_LIBRARY OR NOT NVSHMEM_DEVICE_LIBRARY)
  set(missing "NVSHMEM 3 is not in '${NVSHMEM_ROOT}': pip install nvidia-nvshmem-cu13, or set NVSHMEM_ROOT. \
(pip builds in isolation: NVSHMEM_ROOT, or --no-build-isolation)")
  if(EP_BACKEND_NVSHMEM STREQUAL "AUTO")
    message(STATUS "ep_backend: without NVSHMEM: ${missing}")
    return()
  endif()
  message(FATAL_ERROR "${missing}")
endif()

# NO_EXTRAS: link-time optimisation loses the linked device code.
pybind11_add_module(_nvshmem NO_EXTRAS
  csrc/cuda/counters.cu
  csrc/cuda/rank_host.cu
  csrc/nvshmem/bindings.cpp
  csrc/nvshmem/bindings_hierarchical.cpp
  csrc/nvshmem/bindings_normal.cpp
  csrc/nvshmem/combine.cu
  csrc/nvshmem/dispatch.cu
  csrc/nvshmem/hierarchical.cu
  csrc/nvshmem/hierarchical_combine.cu
  csrc/nvshmem/hierarchical_dispatch.cu
  csrc/nvshmem/low_latency.cu
  csrc/nvshmem/normal.cu
  csrc/nvshmem/normal_combine.cu
  csrc/nvshmem/normal_counts.cu
  csrc/nvshmem/normal_dispatch.cu
  csrc/nvshmem/runtime.cpp)
target_include_directories(_nvshmem PRIVATE csrc)
target_include_directories(_nvshmem SYSTEM PRIVATE ${NVSHMEM_ROOT}/include)
# -maxrregcount: functions that are not inlined are compiled apart from the kernels that call them, and
# do not know of their launch bounds.
target_compile_options(_nvshmem PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall -Wextra -Wno-missing-field-initializers>
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 -fmad=false -maxrregcount=128>)
# All device code of NVSHMEM in one link, and the runtime library that torch has loaded, too.
set_target_properties(_nvshmem PROPERTIES
  CUDA_SEPARABLE_COMPILATION ON
  CUDA_RESOLVE_DEVICE_SYMBOLS ON
  CUDA_RUNTIME_LIBRARY Shared
  INTERPROCEDURAL_OPTIMIZATION OFF
  BUILD_RPATH "${NVSHMEM_ROOT}/lib"
  INSTALL_RPATH "$ORIGIN/../nvidia/nvshmem/lib;$ORIGIN/../nvidia/cu13/lib;$ORIGIN/../nvidia/cuda_runtime/lib;${NVSHMEM_ROOT}/lib")
target_link_libraries(_nvshmem PRIVATE
  ${NVSHMEM_DEVICE_LIBRARY} ${NVSHMEM_HOST_LIBRARY} CUDA::cudart rt dl)
target_link_options(_nvshmem PRIVATE "$<DEVICE_LINK:SHELL:-L${NVSHMEM_ROOT}/lib -lnvshmem_device>")
install(TARGETS _nvshmem LIBRARY DESTINATION ep_backend)

# For the message where the module does not load with another version.
file(STRINGS ${NVSHMEM_ROOT}/include/non_abi/nvshmem_version.h numbers
  REGEX "define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION")
list(TRANSFORM numbers REPLACE "[^0-9]" "")
list(JOIN numbers "." version)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/_nvshmem_version.txt "${version}\n")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_nvshmem_version.txt DESTINATION ep_backend)
message(STATUS "ep_backend: with NVSHMEM ${version} of ${NVSHMEM_ROOT}")
