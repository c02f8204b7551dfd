# Finds RNNDYN_NVCC and tries it out; `reason` says why there is none that can be used, and is empty if there is one. It is looked for where the
# user says, on the PATH, under CUDA_HOME and CONDA_PREFIX, in the wheels of NVIDIA that are installed for this Python, and in /usr/local/cuda.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import site, sys, sysconfig; print(';'.join(dict.fromkeys([sysconfig.get_path('platlib'), *site.getsitepackages(), *sys.path[1:]])))"
  OUTPUT_VARIABLE site_folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
set(wheels "")
foreach(folder IN LISTS site_folders)
  # nvidia-cuda-nvcc puts it in nvidia/cu13 (CUDA 13), nvidia-cuda-nvcc-cu12 in nvidia/cuda_nvcc.
  file(GLOB found LIST_DIRECTORIES true "${folder}/nvidia/cu[0-9]*" "${folder}/nvidia/cuda_nvcc")
  list(APPEND wheels ${found})
endforeach()
find_program(RNNDYN_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS ENV CONDA_PREFIX ${wheels} /usr/local/cuda PATH_SUFFIXES bin)

set(reason "no nvcc was found (on the PATH, under CUDA_HOME or CONDA_PREFIX, in wheels of NVIDIA, or in /usr/local/cuda)")
if(RNNDYN_NVCC)
  execute_process(COMMAND ${RNNDYN_NVCC} --version OUTPUT_VARIABLE output ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" found "${output}")
  set(RNNDYN_NVCC_VERSION "${CMAKE_MATCH_1}")
  if(RNNDYN_NVCC_VERSION VERSION_GREATER_EQUAL 12.4)
    set(reason "")
  else()
    set(reason "${RNNDYN_NVCC} is version '${RNNDYN_NVCC_VERSION}', and 12.4 or later is needed")
  endif()
endif()
if(NOT reason)
  # With the compiler that compiles the rest: nvcc supports host compilers up to some version each, and may lack headers or libraries (of a wheel).
  set(probe ${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe)
  file(WRITE ${probe}.cu "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime_api.h>\n#include <string>\n"
                         "__global__ void kernel(int* x) { *x = 1; }\nint version() { int v; return cudaRuntimeGetVersion(&v); }\n")
  execute_process(COMMAND ${RNNDYN_NVCC} -std=c++17 -ccbin ${CMAKE_CXX_COMPILER} -arch=sm_80 -Xcompiler=-fPIC -cudart static -shared ${probe}.cu -o ${probe}.so
                  RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    file(WRITE ${probe}.log "${output}")
    string(REGEX MATCH "[^\n]*(error|cannot|unsupported)[^\n]*" line "${output}")
    string(STRIP "${line}" line)
    set(reason "${RNNDYN_NVCC} ${RNNDYN_NVCC_VERSION} does not work with ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION} (${line}; ${probe}.log has the rest)")
  endif()
endif()
